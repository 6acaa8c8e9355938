"""Teacher forcing: captures the steps of a given text in the same way as those of a reply.

The text runs through the model in chunks with its KV cache, so that no tensor of size
positions × vocabulary or positions × positions ever exists. Each position is then
processed like a decoded step (``reduce.py``): the same distribution, attention, lens
and checks. A model whose cache does not continue a chunk exactly, such
as one with a recurrent state, runs the text in one piece.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError, UsageError
from oki_trace.llm.capture.attention import QueryRows
from oki_trace.llm.capture.distribution import ModelDistribution, log_probs, summarize
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.model_structure import dummy_token_ids
from oki_trace.llm.capture.reduce import PendingLens, StepReducer, top_attention
from oki_trace.llm.decoding.decode import RawStep
from oki_trace.llm.decoding.forward_pass import cache_in
from oki_trace.llm.decoding.sampling import Choice
from oki_trace.llm.decoding.special_lengths import checkable_lengths
from oki_trace.llm.loading.hardware import computing_dtype, input_device
from oki_trace.records import CapturePolicy, Lens, ReplyChecks, Step

# Steps whose lenses are computed together, and bytes that their rows of logits may have in
# 16 bits. With more, a step is hardly cheaper.
LENS_STEPS = 16
_LENS_BYTES = 2**26
# Bytes of the logits and hidden states of steps whose lenses are computed during the reply.
_WAITING_BYTES = 2**26
# Bytes of logits and of attention rows that a chunk may have, and its length in tokens.
_CHUNK_BYTES = 2**26
_CHUNK_TOKENS = (16, 256)
# Chunks may differ from one pass by what rounding makes of another order of sums.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_16_BIT = 1e-1

_continues_exactly: weakref.WeakKeyDictionary[ModelHooks, bool] = weakref.WeakKeyDictionary()


class NoGivenSteps(CaptureError):
    """The model returns nothing from which given tokens could be traced."""


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of ``length`` tokens, each ``stride`` tokens after the one before.

    Each token is predicted once, in the first window that has it, so all but those of the
    first window see at least ``length - stride`` tokens before them.
    """

    length: int
    stride: int

    @classmethod
    def of(cls, length: Any, stride: Any) -> Windows | None:
        """The windows that were asked for; None for a text in one piece.

        The stride is half a window by default. Raises UsageError for what fits no window.
        """
        if length is None:
            if stride is not None:
                raise UsageError("A stride needs a window. Give the window's length too.")
            return None
        if not isinstance(length, int) or isinstance(length, bool) or length < 2:
            raise UsageError(f"A window must have at least 2 tokens, not {length}.")
        return cls(length, length // 2 if stride is None else stride)

    def __post_init__(self) -> None:
        stride: Any = self.stride
        if not isinstance(stride, int) or not 0 < stride < self.length:
            raise UsageError(
                f"A stride of {self.stride} does not fit a window of {self.length} tokens. Choose "
                "one from 1 to the window's length minus 1."
            )

    def context(self, position: int) -> int:
        """How many tokens the model sees before a token that it predicts."""
        windows_before = max(0, -(-(position - self.length + 1) // self.stride))
        return position - windows_before * self.stride

    def spans(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Where each window begins and ends in a text of so many tokens."""
        for start in range(0, tokens, self.stride):
            end = min(start + self.length, tokens)
            yield start, end
            if end == tokens:
                return


class GivenLenses:
    """Steps of given tokens that wait for their lenses, in the order of their positions.

    Use it from one thread at a time.
    """

    def __init__(self, instrument: Instrument, policy: CapturePolicy) -> None:
        self.policy = policy
        self.reducer = StepReducer(instrument, policy)
        vocab = int(instrument.model.get_input_embeddings().weight.shape[0])
        step_bytes = 2 * vocab * instrument.structure.layers
        self._together = min(max(_LENS_BYTES // step_bytes, 1), LENS_STEPS)
        self._room = waiting_room(instrument)
        self._waiting: list[tuple[Step, PendingLens]] = []

    def add(self, step: Step, lens: PendingLens) -> None:
        """A step after all others."""
        given = replace(step, step_index=-1, origin="given")
        self._waiting.append((given, lens))

    def is_due(self, *, later: bool) -> bool:
        """Whether as many wait as are computed together, or, if there is time ``later``, as
        many as may be in memory.
        """
        return len(self._waiting) >= max(self._together, self._room if later else 0)

    def compute(self) -> list[Step]:
        """The next few steps with their lenses; empty if none waits."""
        count = self._together
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        lenses = self.reducer.lenses([lens for _, lens in batch])
        by_position: dict[int, list[Lens]] = {step.position: [] for step, _ in batch}
        for lens in lenses:
            by_position[lens.step_index].append(replace(lens, step_index=-1))
        return [step.with_lenses(by_position[step.position]) for step, _ in batch]

    def report(self) -> ReplyChecks:
        """The results of the checks so far."""
        # They name generated steps by their numbers, which these do not have.
        return replace(self.reducer.checker.report(), steps=())


def waiting_room(instrument: Instrument) -> int:
    """How many steps of given tokens may wait until their lenses are computed."""
    vocab, width = instrument.model.get_input_embeddings().weight.shape[:2]
    return int(_WAITING_BYTES // (4 * (vocab + width * instrument.structure.layers)))


def teacher_force(
    instrument: Instrument,
    token_ids: Sequence[int],
    policy: CapturePolicy,
    *,
    first: int = 1,
    windows: Windows | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    later: GivenLenses | None = None,
) -> Iterator[Step | ReplyChecks]:
    """The steps of the tokens from position ``first`` on, each with its lens, and the checks.

    The token at position 0 has no step, because nothing predicted it. ``policy`` is that of
    these steps. ``should_stop`` is called after every few steps. With ``later``, made for the
    same policy, the last steps and the checks are left there for the caller to compute.
    Raises CaptureError on NaN or infinite logits.
    """
    lenses = later or GivenLenses(instrument, policy)
    for chunk in _chunks(instrument, token_ids, policy, max(first, 1), windows):
        for step, lens in chunk.reduced(lenses.reducer, policy, len(token_ids)):
            lenses.add(step, lens)
            if lenses.is_due(later=later is not None):
                yield from lenses.compute()
                if should_stop():
                    break
        else:
            continue
        break
    if later is not None:
        return
    while steps := lenses.compute():
        yield from steps
    yield lenses.report()


@dataclass(frozen=True)
class _Chunk:
    """What the model returned for some positions, and the ``positions`` that they predict.

    ``logits`` (rows, vocab); ``hidden_states`` L+1 of (rows, width); ``attention`` by
    layer, (rows, heads, keys), or the mean over heads.
    """

    positions: range
    token_ids: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    attention: QueryRows

    @torch.no_grad()
    def reduced(
        self, reducer: StepReducer, policy: CapturePolicy, tokens: int
    ) -> Iterator[tuple[Step, PendingLens]]:
        """The steps; reduced together where no full tensors are kept."""
        logits = self.logits.float()
        largest = logits.amax(-1)
        finite = (largest > float("-inf")) & (largest < float("inf"))
        if not bool(finite.all()):
            position = self.positions[int(finite.int().argmin())]
            raise CaptureError(
                f"The model's logits are not finite at position {position}. "
                "Load it with --dtype float32, or with other weights."
            )
        summary = summarize(logits, (), self.token_ids, reducer.kept_tokens)
        heads_kept = policy.tensors != "none"
        attention = (
            None
            if heads_kept
            else top_attention(self.attention, self.positions, policy.topk_evidence)
        )
        for i, position in enumerate(self.positions):
            own = summary.row(i)
            last = position == tokens - 1
            # Rows of single queries are needed only where they are stored or checked.
            rows = (
                self.attention if heads_kept or reducer.checker.is_due(position, last=last) else {}
            )
            yield reducer.summarized_step(
                self._raw(i, rows),
                ModelDistribution(logits[i], float(own.entropy), float(own.lse)),
                own,
                last=last,
                reduced=None if attention is None else attention[i],
            )

    def _raw(self, i: int, attention: QueryRows) -> RawStep:
        token, row = self.token_ids[i, None, None], self.logits[i]
        behind = len(self.positions) - 1 - i
        return RawStep(
            logits=row,
            hidden_states=tuple(layer[i] for layer in self.hidden_states),
            # The keys up to the query's own.
            attention={
                layer: rows[i, :, : rows.shape[2] - behind] for layer, rows in attention.items()
            },
            step_index=self.positions[i],
            position=self.positions[i],
            token_id=int(token),
            choice=Choice(token, row, (), sampled=False, race=None),
            elapsed_ms=math.nan,
            stop_reason=None,
        )


def _chunks(
    instrument: Instrument,
    token_ids: Sequence[int],
    policy: CapturePolicy,
    first: int,
    windows: Windows | None,
) -> Iterator[_Chunk]:
    """Run the text, chunk after chunk; yields those with positions from ``first`` on."""
    if first >= len(token_ids):
        return
    in_chunks = runs_in_chunks(instrument)
    spans = windows.spans(len(token_ids)) if windows else [(0, len(token_ids))]
    for window_start, window_end in spans:
        forward = _Forward(instrument, token_ids[:window_end], window_start, policy)
        # Nothing is read of what the last token predicts, so it does not run.
        end = window_end - 1
        length = _chunk_length(instrument, window_end - window_start, policy)
        for start in range(window_start, end, length if in_chunks else max(end, 1)):
            stop = min(start + length, end) if in_chunks else end
            if stop < first:
                forward.skip(start, stop)
                continue
            yield forward.chunk(start, stop, first, use_cache=in_chunks)
            first = stop + 1


class _Forward:
    """The passes over one window, chunk after chunk; positions count from the text's start."""

    def __init__(
        self,
        instrument: Instrument,
        token_ids: Sequence[int],
        first: int,
        policy: CapturePolicy,
    ) -> None:
        """The window begins at position ``first`` and ends with the last of ``token_ids``."""
        self._model = instrument.model
        self._hooks = instrument.hooks
        self._ids = torch.tensor([list(token_ids)], device=input_device(self._model))
        self._first = first
        self._heads = policy.tensors != "none"
        self._cache: dict[str, Any] = {}

    @torch.no_grad()
    def skip(self, start: int, stop: int) -> None:
        """Run the positions from ``start`` up to ``stop`` for the cache alone."""
        self._run(start, stop, use_cache=True)

    @torch.no_grad()
    def chunk(self, start: int, stop: int, first: int, *, use_cache: bool) -> _Chunk:
        """The positions from ``start`` up to ``stop``, which predict those after them."""
        hooks = self._hooks
        with hooks.attach(every_query="heads" if self._heads else "mean"):
            with hooks.forward_arguments() as arguments:
                outputs = self._run(start, stop, use_cache, **arguments)
            hidden_states = hooks.take_hidden_states()
            attention = hooks.take_every_query(outputs)
        logits = outputs.logits[0]
        if len(logits) != stop - start:
            raise NoGivenSteps(
                f"{type(self._model).__name__} does not predict the next token at every position, "
                "so given text cannot be traced. Use --trace-prompt none, or choose another model."
            )
        skipped = max(0, first - 1 - start)
        positions = range(start + skipped + 1, stop + 1)
        return _Chunk(
            positions,
            self._ids[0, positions.start : positions.stop],
            logits[skipped:],
            tuple(layer[skipped:] for layer in hidden_states),
            {layer: rows[skipped:] for layer, rows in attention.items()},
        )

    def _run(self, start: int, stop: int, use_cache: bool, **arguments: Any) -> Any:
        arguments |= {"use_cache": use_cache, **self._cache}
        outputs = _run(self._model, self._ids, (start, stop), self._first, **arguments)
        named = cache_in(outputs) if use_cache else None
        self._cache = {} if named is None else {named[0]: named[1]}
        return outputs


def _run(model: Any, ids: Tensor, span: tuple[int, int], first: int, **arguments: Any) -> Any:
    """The outputs for the positions of a span, counted from ``first`` as ``generate()`` does."""
    if "position_ids" in signature(model.forward).parameters:
        arguments["position_ids"] = torch.arange(*span, device=ids.device)[None] - first
    return model(input_ids=ids[:, slice(*span)], return_dict=True, **arguments)


def _chunk_length(instrument: Instrument, tokens: int, policy: CapturePolicy) -> int:
    """As long as the logits and the attention of a chunk take at most ``_CHUNK_BYTES`` each."""
    config = instrument.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    kept = heads * instrument.structure.layers if policy.tensors != "none" else heads
    vocab = int(instrument.model.get_input_embeddings().weight.shape[0])
    largest = 4 * max(vocab, kept * tokens)
    shortest, longest = _CHUNK_TOKENS
    return min(max(_CHUNK_BYTES // largest, shortest), longest)


def runs_in_chunks(instrument: Instrument) -> bool:
    """Whether the model's cache continues a chunk exactly; found out once for a load."""
    known = _continues_exactly.get(instrument.hooks)
    if known is None:
        known = _continues_exactly[instrument.hooks] = _compare(instrument)
    return known


@torch.no_grad()
def _compare(instrument: Instrument) -> bool:
    model, structure = instrument.model, instrument.structure
    length = checkable_lengths(model, structure.blocks, structure.dummy_ids.device.type).text_length
    for count in {structure.dummy_ids.shape[1], length or structure.dummy_ids.shape[1]}:
        ids = dummy_token_ids(model, count)
        half = count // 2
        try:
            one_pass = _run(model, ids, (0, count), 0, use_cache=False).logits[0]
            first = _run(model, ids, (0, half), 0, use_cache=True)
            named = cache_in(first)
            if named is None:
                return False
            cache = {named[0]: named[1]}
            second = _run(model, ids, (half, count), 0, use_cache=True, **cache)
            chunks = torch.cat([first.logits[0], second.logits[0]])
        except Exception:  # whatever a model's own code raises, the text runs in one piece
            return False
        if one_pass.shape != chunks.shape:
            return False
        difference = (log_probs(one_pass) - log_probs(chunks)).abs()
        finite = difference[difference.isfinite()]
        tolerance = _TOLERANCE.get(computing_dtype(model), _TOLERANCE_16_BIT)
        if len(finite) and float(finite.max()) > tolerance:
            return False
    return True
