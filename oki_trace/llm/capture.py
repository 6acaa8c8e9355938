"""Capturing a reply: each step as it is decoded, and a few steps later its lens.

This is where the parts meet: ``decode`` makes the tensors of a step, ``ahead``
lets it run on while ``reduce`` makes records of them, and their lenses follow
``behind``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from oki_trace.llm.ahead import Ahead, one_core
from oki_trace.llm.behind import Behind
from oki_trace.llm.decode import RawStep, decode
from oki_trace.llm.instrument import Instrument
from oki_trace.llm.reduce import Unlensed, lenses_of, step_of
from oki_trace.records import CapturePolicy, Generation, Lens, Prompt, Step


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
    lens, vocabulary = instrument.lens, instrument.vocabulary

    def decoded(abandoned: Callable[[], bool] = lambda: False) -> Generator[RawStep]:
        model, tokenizer, probe = instrument.model, instrument.tokenizer, instrument.probe
        return decode(model, tokenizer, probe, prompt.token_ids, generation, abandoned)

    def compute(steps: list[Unlensed]) -> list[Lens]:
        return lenses_of(steps, lens, vocabulary, policy.topk_lens) if lens else []

    # Weights that come and go with each call cannot serve two threads.
    with Behind(compute, aside=not instrument.moves_weights) as behind:
        try:
            if instrument.moves_weights:
                with closing(decoded()) as alone:
                    yield from _follow(alone, behind, instrument, policy, should_stop)
            else:
                with (
                    one_core() as cores,
                    closing(Ahead(decoded, (cores, max(1, cores - 1)))) as ahead,
                ):
                    yield from _follow(ahead, behind, instrument, policy, should_stop)
        except Exception:
            yield from behind.rest()
            raise
        yield from behind.rest()


def _follow(
    steps: Iterator[RawStep],
    behind: Behind,
    instrument: Instrument,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Step, str | None] | Lens]:
    for raw in steps:
        step, unlensed = step_of(raw, instrument.vocabulary, policy)
        stopped = raw.finished is None and should_stop()
        # Only now: a lens is of a step that was handed over.
        behind.add(unlensed)
        yield step, "stopped" if stopped else raw.finished
        yield from behind.ready()
        if stopped:
            return
