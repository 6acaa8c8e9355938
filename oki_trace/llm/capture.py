"""Capturing a reply: each step as it is decoded, and a few steps later its lens.

This is where the parts meet: ``decode`` makes the tensors of a step, ``reduce``
makes records of them, ``trailing`` sees to it that the lens costs the decoder
next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

from oki_trace.llm.anatomy import input_device
from oki_trace.llm.decode import decode
from oki_trace.llm.instrument import Instrument
from oki_trace.llm.reduce import Unlensed, lenses_of, step_of
from oki_trace.llm.trailing import TrailingLens
from oki_trace.records import CapturePolicy, Generation, Lens, Prompt, Step


def capture(
    instrument: Instrument,
    prompt: Prompt,
    generation: Generation,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
    settle: Callable[[], None],
) -> Iterator[tuple[Step, str | None] | Lens]:
    """Decode and yield each step with its stop reason, and, a few steps later, its lens.

    Every step's lens has been yielded when the iterator ends or raises.
    ``settle`` is called before a step that takes every core of a small CPU: it
    returns when whoever took the last step has no work left to do on it.
    """
    if generation.max_new_tokens == 0:
        return
    lens, vocabulary = instrument.lens, instrument.vocabulary

    def compute(steps: list[Unlensed]) -> list[Lens]:
        return lenses_of(steps, lens, vocabulary, policy.topk_lens) if lens else []

    steps = decode(
        instrument.model, instrument.tokenizer, instrument.probe, prompt.token_ids, generation
    )
    on_cpu = input_device(instrument.model).type == "cpu"
    trailing = TrailingLens(compute, aside=not instrument.moves_weights)
    with closing(steps), trailing:
        try:
            for raw in steps:
                step, unlensed = step_of(raw, vocabulary, policy)
                stopped = raw.finished is None and should_stop()
                # Only now: a lens is of a step that was handed over.
                if lens is not None:
                    trailing.add(unlensed)
                yield step, "stopped" if stopped else raw.finished
                yield from trailing.ready()
                if stopped:
                    break
                if on_cpu and trailing.decoder_has_all_cores:
                    settle()
        except Exception:
            yield from trailing.rest()
            raise
        yield from trailing.rest()
