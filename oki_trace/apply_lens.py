"""Reads the stored hidden states of old replies with an installed lens, without the model's blocks.

A step that has hidden states and no reading of the lens is read, and its reading written in a
transaction of its own. So this can be interrupted, and goes on where it stopped; a second
run finds nothing to do. The stored numbers of the model itself are the last layer's.

The loaded tail is held against the trace: what it makes of the stored hidden state of the
last layer must be the stored probabilities, as far as the stored form allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError, NotFound, OkiTraceError
from oki_trace.llm.capture.distribution import Distribution, ModelDistribution, summarize
from oki_trace.llm.capture.instrument import Instrument, instrument
from oki_trace.llm.capture.lens import DRAFT_TOLERANCE, LensProjection, LensTarget, LogitLens
from oki_trace.llm.capture.reduce import lens_record
from oki_trace.llm.lenses.library import load_transport
from oki_trace.llm.lenses.reading import LensReader
from oki_trace.llm.loading.tail import LoadedTail, load_tail
from oki_trace.records import (
    Candidates,
    CaptureReport,
    Lens,
    Message,
    ModelChoice,
    StepSummary,
    TensorRecord,
)
from oki_trace.reporting import Progress
from oki_trace.store.reading.lenses import UnreadStep
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.readings import ReadingWriter
from oki_trace.store.writing.writer import TraceWriter

# Steps that are read together: with more, a step is hardly cheaper.
_TOGETHER = 8
# The largest |Δprob| of the chosen token between the stored one and what the tail makes of
# the stored hidden state. A 16-bit stream, and a compact one, is rounded.
_TOLERANCE_EXACT = 1e-3
_TOLERANCE_ROUNDED = 0.1


@dataclass
class Applied:
    """What has been read: ``steps`` now, in ``messages``; ``refused`` says why others were not.

    ``loaded_bytes``, ``loaded_blocks`` and ``load_seconds`` are the largest of the loaded
    tails; ``seconds`` is the time of the reading.
    """

    lens: str
    steps: int = 0
    messages: int = 0
    stopped: bool = False
    loaded_bytes: int = 0
    loaded_blocks: int = 0
    load_seconds: float = 0.0
    seconds: float = 0.0
    refused: dict[int, str] = field(default_factory=dict)


def apply_lens(
    writer: TraceWriter,
    reader: TraceReader,
    name: str,
    conversation_id: int | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    loader: Callable[[ModelChoice, str], LoadedTail] = load_tail,
) -> Applied:
    """Read all unread steps of a conversation, or of the whole store, with the lens ``name``.

    ``should_stop`` is called after each few steps. Raises UsageError for a lens that is not
    installed or a conversation that has no stored hidden states; a reply that cannot be read
    is named in ``refused``.
    """
    transport = load_transport(name)
    result = Applied(name)
    waiting: dict[tuple[ModelChoice, str], list[Message]] = {}
    total = 0
    for message in _replies(reader, conversation_id):
        count = sum(1 for _ in reader.unread_steps(message.id, name))
        if count and message.capture is not None and not message.status.is_live:
            choice = message.choice or ModelChoice(message.model_id or "")
            choice = ModelChoice(choice.model_id, device=choice.device)
            waiting.setdefault((choice, message.capture.dtype), []).append(message)
            total += count
    readings = ReadingWriter(writer)
    for (choice, dtype), messages in waiting.items():
        try:
            tail = loader(choice, dtype)
            handle = instrument(tail.loaded.model, tail.loaded.tokenizer)
        except OkiTraceError as error:
            result.refused |= {message.id: str(error) for message in messages}
            continue
        result.loaded_bytes = max(result.loaded_bytes, tail.bytes)
        result.loaded_blocks = max(result.loaded_blocks, tail.blocks)
        result.load_seconds += tail.loaded.seconds
        began = time.perf_counter()
        for message in messages:
            try:
                assert message.capture is not None
                layers = message.capture.layers
                transport.require_fit(handle.model, layers, handle.structure.streams)
                lens_reader = LensReader(transport, layers, range(layers))
                pass_ = _Pass(handle, reader, message, lens_reader)
                before = result.steps
                for step_id, lens in pass_.readings(name):
                    readings.add(step_id, lens)
                    result.steps += 1
                    if progress is not None:
                        progress(result.steps, total)
                    if should_stop():
                        result.stopped = True
                        break
                result.messages += result.steps > before
            except (CaptureError, NotFound) as error:
                result.refused[message.id] = str(error)
            if result.stopped:
                break
        result.seconds += time.perf_counter() - began
        if result.stopped:
            break
    return result


def _replies(reader: TraceReader, conversation_id: int | None) -> Iterator[Message]:
    ids = [conversation_id] if conversation_id is not None else sorted(_conversations(reader))
    for number in ids:
        try:
            yield from reader.messages(number)
        except NotFound:
            if conversation_id is not None:
                raise


def _conversations(reader: TraceReader) -> Iterator[int]:
    offset = 0
    while page := reader.conversations(limit=200, offset=offset):
        yield from (conversation.id for conversation in page)
        offset += len(page)


class _Pass:
    """Reads the steps of one reply."""

    def __init__(
        self, handle: Instrument, reader: TraceReader, message: Message, lens: LensReader
    ) -> None:
        assert message.capture is not None
        if handle.lens.projection is None:
            raise CaptureError(f"No lens can read this model: {handle.lens.reason}.")
        self._handle = handle
        self._reader = reader
        self._message = message
        self._capture: CaptureReport = message.capture
        self._lens = lens
        self._exact: LogitLens = handle.lens.projection
        self._draft = handle.draft_for(self._capture.policy)
        self._is_draft_checked = False
        self._k = self._capture.policy.topk_lens

    def readings(self, name: str) -> Iterator[tuple[int, Lens]]:
        """The id of each unread step, and its reading."""
        unread = self._reader.unread_steps(self._message.id, name)
        stored: dict[bool, _Stored] = {}
        while batch := list(islice(unread, _TOGETHER)):
            for given in (False, True):
                steps = [one for one in batch if (one.step_index < 0) is given]
                if not steps:
                    continue
                if given not in stored:
                    stored[given] = _Stored(self._reader, self._message.id, given=given)
                yield from self._read(steps, stored[given])

    @torch.no_grad()
    def _read(self, steps: Sequence[UnreadStep], stored: _Stored) -> Iterator[tuple[int, Lens]]:
        tensors = stored.hidden_states([stored.index(step) for step in steps])
        steps = [step for step in steps if stored.index(step) in tensors]
        if not steps:
            return
        hidden = torch.stack([_tensor(tensors[stored.index(step)]) for step in steps])
        hidden = hidden.to(self._handle.structure.dummy_ids.device)
        if hidden.ndim != 3 or hidden.shape[1] != self._capture.layers + 1:
            raise CaptureError(
                f"Message {self._message.id} has hidden states of another form. Run `oki-trace "
                "verify`."
            )
        logits = self._exact.project(hidden[:, -1])
        chosen = torch.tensor([step.token_id for step in steps])
        own = summarize(logits, (), chosen, max(self._k, 2))
        targets = []
        for i, step in enumerate(steps):
            row = own.row(i)
            self._check(step, float(row.chosen_prob), stored.summary(step))
            model = ModelDistribution(logits[i], float(row.entropy), float(row.lse))
            targets.append(LensTarget(step.token_id, model, row.token_ids[0]))
        inner = hidden[:, self._lens.inner]
        projection = self._projection(inner, targets)
        summaries = self._lens.summarize(inner, targets, self._k, projection)
        for i, (step, summary) in enumerate(zip(steps, summaries, strict=True)):
            last = stored.last_layer(step, own.row(i), self._k)
            made = lens_record(step.step_index, summary, last, self._handle.vocabulary, self._k)
            yield step.id, replace(made, name=self._lens.name, layers=self._lens.layers)

    def _projection(self, hidden: Tensor, targets: Sequence[LensTarget]) -> LensProjection:
        """The draft, once it agrees with the exact projection on a step of this reply."""
        if self._draft is None:
            return self._exact
        if not self._is_draft_checked:
            rows = self._lens.transported(hidden[:1])
            exact = self._exact.project(rows)
            (drafted,) = self._draft.project_steps(rows, [targets[0].exact_ids], self._k)
            error = float((drafted.softmax(-1) - exact.softmax(-1)).abs().max())
            self._is_draft_checked = True
            if not error <= DRAFT_TOLERANCE:
                self._draft = None
                return self._exact
        return self._draft

    def _check(self, step: UnreadStep, prob: float, stored: StepSummary) -> None:
        is_exact = self._capture.policy.tensors == "exact" and self._capture.dtype == "float32"
        tolerance = _TOLERANCE_EXACT if is_exact else _TOLERANCE_ROUNDED
        if not abs(prob - stored.prob) <= tolerance:
            raise CaptureError(
                f"Message {self._message.id} is not read: the model's head gives the token at "
                f"position {step.position} a probability of {prob:.3f}, the trace "
                f"{stored.prob:.3f}. Use the version of {self._message.model_id} that was traced."
            )


class _Stored:
    """The stored numbers of the generated, or the given, steps of a reply."""

    def __init__(self, reader: TraceReader, message_id: int, *, given: bool) -> None:
        self._reader = reader
        self._message_id = message_id
        self._given = given
        self._summaries = {self._index(s): s for s in reader.steps(message_id, given=given)}
        self._candidates = reader.candidates(message_id, given=given)

    def _index(self, step: Any) -> int:
        return int(step.position if self._given else step.step_index)

    def index(self, step: UnreadStep) -> int:
        """The number by which the step is read: of a given one, its position."""
        return self._index(step)

    def summary(self, step: UnreadStep) -> StepSummary:
        """The step's own numbers."""
        return self._summaries[self._index(step)]

    def hidden_states(self, indices: Iterable[int]) -> dict[int, TensorRecord]:
        """The stored hidden states of these steps that still have them."""
        return self._reader.tensors(
            self._message_id, "hidden_states", list(indices), given=self._given
        )

    def last_layer(self, step: UnreadStep, own: Distribution, k: int) -> Distribution:
        """The model's own distribution as it was traced, in place of ``own`` (one row)."""
        summary = self.summary(step)
        candidates: Candidates | None = self._candidates.get(self._index(step))
        stored = replace(
            own,
            entropy=torch.tensor([summary.entropy]),
            chosen_rank=torch.tensor([summary.rank]),
            chosen_prob=torch.tensor([summary.prob]),
        )
        if candidates is None or len(candidates.token_ids) < min(k, own.token_ids.shape[1]):
            return stored
        return replace(
            stored,
            token_ids=torch.from_numpy(candidates.token_ids[:k])[None],
            logits=torch.from_numpy(candidates.logits[:k])[None],
            probs=torch.from_numpy(candidates.probs[:k])[None],
        )


def _tensor(record: TensorRecord) -> Tensor:
    """The tensor in the dtype in which the model made it."""
    made = torch.tensor(record.array)  # a copy: what was decoded is read-only
    return made.view(torch.bfloat16) if record.dtype == "bfloat16" else made
