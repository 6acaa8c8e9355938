"""Captures a reply: each step when it is decoded, and its lens a few steps later.

``decode`` computes the tensors of each step in one thread, ``reduce`` turns them into
records in the caller's thread, and the ``LensWorker`` computes the lenses in a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from oki_trace.llm.accelerate_internals import moves_weights
from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.lens_worker import LensWorker
from oki_trace.llm.capture.reduce import StepReducer
from oki_trace.llm.capture.reply_checks import ReplyChecker
from oki_trace.llm.capture.teacher_forcing import GivenLenses
from oki_trace.llm.decoding.decode import decode
from oki_trace.llm.decoding.decoder_thread import iterate_in_thread, with_thread_state
from oki_trace.records import CapturePolicy, Generation, Lens, Prompt, ReplyChecks, Step


def capture(
    instrument: Instrument,
    prompt: Prompt,
    generation: Generation,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
    forced: Sequence[int] = (),
    reused: int | None = None,
    given: GivenLenses | None = None,
) -> Iterator[tuple[Step, str | None] | Step | Lens | ReplyChecks]:
    """Decode and yield each step with its stop reason, and, a few steps later, its lens.

    When the iterator ends or raises, it has yielded every step's lens (none after a step
    whose lens disagreed with the model) and last the checks of the reply's numbers.
    ``forced``: the tokens of the first steps; ``generation`` limits those after them.
    ``reused``: see ``decode``. ``given``: steps of the prompt, yielded as they are done, and
    their checks before the reply's.
    """
    if generation.max_new_tokens + len(forced) == 0:
        if given is not None:
            yield from rest_of(given)
        return
    reducer = StepReducer(
        instrument, policy.for_reply, None if given is None else given.reducer.draft
    )
    checker = reducer.checker
    raw_steps = decode(
        instrument.model,
        instrument.tokenizer,
        instrument.hooks,
        instrument.fast,
        prompt.token_ids,
        generation,
        checker.note,
        forced,
        reused,
    )
    # Weights that accelerate moves with each call cannot serve two threads.
    in_thread = not moves_weights(instrument.model)

    def background() -> list[Step]:
        return [] if given is None else given.compute()

    with LensWorker(
        with_thread_state(reducer.lenses),
        in_thread=in_thread,
        background=with_thread_state(background),
    ) as lens_worker:
        try:
            with iterate_in_thread(raw_steps) if in_thread else closing(raw_steps) as steps:
                for raw in steps:
                    stopped = raw.stop_reason is None and should_stop()
                    last = stopped or raw.stop_reason is not None
                    step, pending = reducer.step(raw, last=last)
                    # Only a step that was reduced has a lens.
                    lens_worker.add(pending)
                    yield step, "stopped" if stopped else raw.stop_reason
                    yield from lens_worker.poll()
                    if stopped:
                        break
        except Exception:
            yield from lens_worker.drain()
            yield from _reports(checker, given)
            raise
        yield from lens_worker.drain()
        yield from _reports(checker, given)


def rest_of(given: GivenLenses) -> Iterator[Step | ReplyChecks]:
    """The steps that still wait for their lenses, and their checks."""
    while steps := given.compute():
        yield from steps
    yield given.report()


def _reports(checker: ReplyChecker, given: GivenLenses | None) -> Iterator[ReplyChecks]:
    if given is not None:
        yield given.report()
    yield checker.report()
