"""Capturing a reply: each step as it is decoded, and a few steps later its lens.

This is where the parts meet: ``decode`` makes the tensors of a step, ``ahead``
lets it run on while ``reduce`` makes records of them, and their lenses follow
``behind``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.lens_worker import LensWorker
from oki_trace.llm.capture.reduce import PendingLens, compute_lenses, make_step
from oki_trace.llm.capture.reply_checks import ReplyChecker
from oki_trace.llm.decoding.decode import RawStep, decode
from oki_trace.llm.decoding.decoder_thread import iterate_in_thread
from oki_trace.llm.decoding.thread_state import with_thread_state
from oki_trace.records import CapturePolicy, Generation, Lens, Prompt, ReplyChecks, Step


def capture(
    instrument: Instrument,
    prompt: Prompt,
    generation: Generation,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
    forced: Sequence[int] | None = None,
) -> Iterator[tuple[Step, str | None] | Lens | ReplyChecks]:
    """Decode and yield each step with its stop reason, and, a few steps later, its lens.

    Every step's lens has been yielded when the iterator ends or raises, and last of
    all how far the reply's numbers agree with the model. (No lens follows once one
    disagreed.) ``forced``: the tokens to say, whatever would be chosen.
    """
    if generation.max_new_tokens == 0:
        return
    lens, draft = instrument.lens, instrument.draft_for(policy)
    checker = instrument.checker()

    def compute(steps: list[PendingLens]) -> list[Lens]:
        if lens is None or not checker.lens_holds:
            return []
        return compute_lenses(steps, lens, draft, checker, instrument.vocabulary, policy.topk_lens)

    steps = decode(
        instrument.model,
        instrument.tokenizer,
        instrument.hooks,
        instrument.fast,
        prompt.token_ids,
        generation,
        checker.note,
        forced,
    )
    # Weights that come and go with each call cannot serve two threads.
    alone = instrument.moves_weights
    with LensWorker(with_thread_state(compute), aside=not alone) as lens_worker:
        try:
            with closing(steps) if alone else iterate_in_thread(steps) as taken:
                yield from _follow(taken, lens_worker, instrument, policy, checker, should_stop)
        except Exception:
            yield from lens_worker.rest()
            yield checker.report()
            raise
        yield from lens_worker.rest()
        yield checker.report()


def _follow(
    steps: Iterator[RawStep],
    lens_worker: LensWorker,
    instrument: Instrument,
    policy: CapturePolicy,
    checker: ReplyChecker,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Step, str | None] | Lens]:
    for raw in steps:
        stopped = raw.stop_reason is None and should_stop()
        last = stopped or raw.stop_reason is not None
        step, pending = make_step(raw, instrument.vocabulary, policy, checker, last=last)
        # Only now: a lens is of a step that was handed over.
        lens_worker.add(pending)
        yield step, "stopped" if stopped else raw.stop_reason
        yield from lens_worker.ready()
        if stopped:
            return
