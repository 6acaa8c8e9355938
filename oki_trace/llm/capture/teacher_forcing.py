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
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError, UsageError
from oki_trace.llm.capture.attention import QueryRows
from oki_trace.llm.capture.distribution import log_probs
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.lens_worker import BATCH_STEPS
from oki_trace.llm.capture.model_structure import dummy_token_ids
from oki_trace.llm.capture.reduce import PendingLens, StepReducer
from oki_trace.llm.decoding.decode import RawStep
from oki_trace.llm.decoding.forward_pass import AttentionCapture, cache_in
from oki_trace.llm.decoding.sampling import Choice
from oki_trace.llm.decoding.special_lengths import checkable_lengths
from oki_trace.llm.loading.hardware import computing_dtype, input_device
from oki_trace.records import CapturePolicy, ReplyChecks, Step

# Bytes of logits and of attention rows that a chunk may have, and its length in tokens.
_CHUNK_BYTES = 2**26
_CHUNK_TOKENS = (16, 256)
# Chunks may differ from one pass by what rounding makes of another order of sums.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_16_BIT = 1e-1

_continues_exactly: weakref.WeakKeyDictionary[ModelHooks, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of ``length`` tokens, each ``stride`` tokens after the one before.

    Each token is predicted once, in the first window that has it, so all but those of the
    first window see at least ``length - stride`` tokens before them.
    """

    length: int
    stride: int

    def __post_init__(self) -> None:
        if not 0 < self.stride < self.length:
            raise UsageError(
                f"A stride of {self.stride} does not fit a window of {self.length} tokens. Choose "
                "one from 1 to the window's length minus 1."
            )

    def spans(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Where each window begins and ends in a text of so many tokens."""
        for start in range(0, tokens, self.stride):
            end = min(start + self.length, tokens)
            yield start, end
            if end == tokens:
                return


def teacher_force(
    instrument: Instrument,
    token_ids: Sequence[int],
    policy: CapturePolicy,
    *,
    first: int = 1,
    windows: Windows | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step | ReplyChecks]:
    """The steps of the tokens from position ``first`` on, each with its lens, and the checks.

    The token at position 0 has no step, because nothing predicted it. ``policy`` is that of
    these steps. ``should_stop`` is called after every chunk. Raises CaptureError on NaN or
    infinite logits.
    """
    reducer = StepReducer(instrument, policy)
    pending: list[tuple[Step, PendingLens]] = []
    for raw in _raw_steps(instrument, token_ids, policy, max(first, 1), windows, should_stop):
        step, lens = reducer.step(raw, last=raw.position == len(token_ids) - 1)
        pending.append((replace(step, step_index=-1, origin="given"), lens))
        if len(pending) == BATCH_STEPS:
            yield from _with_lenses(reducer, pending)
            pending = []
    yield from _with_lenses(reducer, pending)
    # The checks name generated steps by their numbers, which these do not have.
    yield replace(reducer.checker.report(), steps=())


def _with_lenses(
    reducer: StepReducer, pending: Sequence[tuple[Step, PendingLens]]
) -> Iterator[Step]:
    lenses = reducer.lenses([lens for _, lens in pending]) if pending else []
    by_position = {lens.step_index: replace(lens, step_index=-1) for lens in lenses}
    for step, _ in pending:
        yield replace(step, lens=by_position.get(step.position))


def _raw_steps(
    instrument: Instrument,
    token_ids: Sequence[int],
    policy: CapturePolicy,
    first: int,
    windows: Windows | None,
    should_stop: Callable[[], bool],
) -> Iterator[RawStep]:
    """Run the text, chunk after chunk; yields the steps from position ``first`` on."""
    in_chunks = _in_chunks(instrument)
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
            yield from forward.steps(start, stop, first, use_cache=in_chunks)
            first = stop + 1
            if should_stop():
                return


class _Forward:
    """The passes over one window, chunk after chunk; positions count from the text's start."""

    def __init__(
        self, instrument: Instrument, token_ids: Sequence[int], first: int, policy: CapturePolicy
    ) -> None:
        """The window begins at position ``first`` and ends with the last of ``token_ids``."""
        self._model = instrument.model
        self._hooks = instrument.hooks
        self._ids = torch.tensor([list(token_ids)], device=input_device(self._model))
        self._heads = policy.tensors != "none"
        self._cache: dict[str, Any] = {}

    @torch.no_grad()
    def skip(self, start: int, stop: int) -> None:
        """Run the positions from ``start`` up to ``stop`` for the cache alone."""
        self._run(start, stop, use_cache=True)

    def steps(self, start: int, stop: int, first: int, *, use_cache: bool) -> Iterator[RawStep]:
        """The steps that the positions from ``start`` up to ``stop`` predict."""
        logits, hidden_states, attention = self._captured(start, stop, use_cache)
        keys = {layer: rows.shape[2] for layer, rows in attention.items()}
        for i in range(max(0, first - 1 - start), stop - start):
            position = start + i + 1
            row = logits[i].clone()
            if not float("-inf") < float(row.max()) < float("inf"):
                raise CaptureError(
                    f"The model's logits are not finite at position {position}. "
                    "Load it with --dtype float32, or with other weights."
                )
            token = self._ids[:, position, None]
            yield RawStep(
                logits=row,
                hidden_states=tuple(layer[i] for layer in hidden_states),
                attention=_rows_of(attention, i, keys, stop - start),
                step_index=position,
                position=position,
                token_id=int(token),
                choice=Choice(token, row, (), sampled=False, race=None),
                elapsed_ms=math.nan,
                stop_reason=None,
            )

    @torch.no_grad()
    def _captured(
        self, start: int, stop: int, use_cache: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], QueryRows]:
        hooks = self._hooks
        with hooks.attach(every_query="heads" if self._heads else "mean"):
            with hooks.forward_arguments() as arguments:
                outputs = self._run(start, stop, use_cache, **arguments)
            return outputs.logits[0], hooks.take_hidden_states(), hooks.take_every_query(outputs)

    def _run(self, start: int, stop: int, use_cache: bool, **arguments: Any) -> Any:
        outputs = self._model(
            input_ids=self._ids[:, start:stop],
            use_cache=use_cache,
            return_dict=True,
            **self._cache,
            **arguments,
        )
        named = cache_in(outputs) if use_cache else None
        self._cache = {} if named is None else {named[0]: named[1]}
        return outputs


def _rows_of(attention: QueryRows, i: int, keys: dict[int, int], queries: int) -> AttentionCapture:
    """The rows of query ``i`` of ``queries``: the keys up to its own."""
    return {
        layer: rows[i, :, : keys[layer] - (queries - 1 - i)] for layer, rows in attention.items()
    }


def _chunk_length(instrument: Instrument, tokens: int, policy: CapturePolicy) -> int:
    """As long as the logits and the attention of a chunk take at most ``_CHUNK_BYTES`` each."""
    config = instrument.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    kept = heads * instrument.structure.layers if policy.tensors != "none" else heads
    largest = 4 * max(int(config.vocab_size), kept * tokens)
    shortest, longest = _CHUNK_TOKENS
    return min(max(_CHUNK_BYTES // largest, shortest), longest)


def _in_chunks(instrument: Instrument) -> bool:
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
            one_pass = model(input_ids=ids, use_cache=False).logits[0]
            first = model(input_ids=ids[:, :half], use_cache=True)
            named = cache_in(first)
            if named is None:
                return False
            second = model(input_ids=ids[:, half:], use_cache=True, **{named[0]: named[1]})
            chunks = torch.cat([first.logits[0], second.logits[0]])
        except Exception:  # whatever a model's own code raises, the text runs in one piece
            return False
        difference = (log_probs(one_pass) - log_probs(chunks)).abs()
        finite = difference[difference.isfinite()]
        tolerance = _TOLERANCE.get(computing_dtype(model), _TOLERANCE_16_BIT)
        if one_pass.shape != chunks.shape or (len(finite) and float(finite.max()) > tolerance):
            return False
    return True
