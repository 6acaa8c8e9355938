"""Capturing a reply: each step as it is decoded, and a few steps later its lens.

This is where the parts meet: ``decode`` makes the tensors of a step, ``ahead``
lets it run on while ``reduce`` makes records of them. The lens, which costs
several times the model's own head, is computed for a few steps together, when
no step waits to be handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from oki_trace.llm.ahead import Ahead, one_core
from oki_trace.llm.decode import RawStep, decode
from oki_trace.llm.instrument import Instrument
from oki_trace.llm.reduce import Unlensed, lenses_of, step_of
from oki_trace.records import CapturePolicy, Generation, Lens, Prompt, Step

# Steps whose lens is computed in one go: more of them hardly make a step cheaper.
TOGETHER = 4
# Steps that may wait for their lens while newer ones come; they hold their tensors.
AT_MOST = 3 * TOGETHER


def capture(
    instrument: Instrument,
    prompt: Prompt,
    generation: Generation,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Step, str | None] | Lens]:
    """Decode and yield each step with its stop reason, and, a few steps later, its lens.

    Every step's lens has been yielded when the iterator ends or raises.
    """
    if generation.max_new_tokens == 0:
        return

    def decoded() -> Generator[RawStep]:
        return decode(
            instrument.model, instrument.tokenizer, instrument.probe, prompt.token_ids, generation
        )

    behind = _Behind(instrument, policy)
    try:
        if instrument.moves_weights:
            # Weights that come and go with each call cannot serve two threads.
            with closing(decoded()) as alone:
                yield from _follow(alone, behind, should_stop)
        else:
            with (
                one_core() as cores,
                closing(Ahead(decoded, (cores, max(1, cores - 1)))) as ahead,
            ):
                yield from _follow(ahead, behind, should_stop)
    except Exception:
        yield from behind.lenses()
        raise
    yield from behind.lenses()


def _follow(
    steps: Iterator[RawStep], behind: _Behind, should_stop: Callable[[], bool]
) -> Iterator[tuple[Step, str | None] | Lens]:
    for raw in steps:
        step = behind.reduce(raw)
        stopped = raw.finished is None and should_stop()
        yield step, "stopped" if stopped else raw.finished
        if stopped:
            return
        if behind.is_due(more=isinstance(steps, Ahead) and steps.waiting):
            yield from behind.lenses()


class _Behind:
    """What is made of the steps, and those whose lens is still to come."""

    def __init__(self, instrument: Instrument, policy: CapturePolicy) -> None:
        self._lens = instrument.lens
        self._vocabulary = instrument.vocabulary
        self._policy = policy
        self._waiting: list[Unlensed] = []

    def reduce(self, raw: RawStep) -> Step:
        """The record of a step; its lens is one of the next."""
        step, unlensed = step_of(raw, self._vocabulary, self._policy)
        if self._lens is not None:
            self._waiting.append(unlensed)
        return step

    def is_due(self, *, more: bool) -> bool:
        """Whether lenses are to be computed now; ``more``: steps wait to be handed on."""
        return len(self._waiting) >= (AT_MOST if more else TOGETHER)

    def lenses(self) -> Iterator[Lens]:
        """Every lens not yet given."""
        while self._waiting and self._lens is not None:
            due, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            yield from lenses_of(due, self._lens, self._vocabulary, self._policy.topk_lens)
