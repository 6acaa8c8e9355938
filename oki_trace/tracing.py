"""One traced turn: from the messages of a conversation to a finished reply.

This is where the model side and the places a trace goes to meet. A sink is
anything that takes a reply as it grows: the store's recorder, a list, a
progress display. Whatever goes wrong after the sinks are told of the end, so
no reply is left open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from oki_trace.errors import CaptureError, OkiTraceError
from oki_trace.llm.capture.instrument import Instrument, forget, instrument
from oki_trace.llm.capture.pipeline import capture
from oki_trace.llm.capture.vocabulary import require_embeddings
from oki_trace.llm.chat.prompt import render
from oki_trace.llm.chat.reply_text import ReplyText
from oki_trace.llm.decoding.generation import resolve_generation
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.llm.failures import INTERRUPTIONS, is_out_of_memory, summary
from oki_trace.llm.loading.activity import Activity, report_activity
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Lens,
    PartKind,
    Prompt,
    ReplyChecks,
    Sampling,
    Status,
    Step,
    TemplateOptions,
    TurnEnd,
    TurnStart,
)

# A piece of the reply's text, and the kind of part it belongs to.
OnText = Callable[[str, PartKind], None]


class Sink(Protocol):
    """Takes a reply as it grows; ``start`` comes first and ``end`` last, each once."""

    def start(self, start: TurnStart) -> None: ...
    def step(self, step: Step) -> None: ...
    def lens(self, lens: Lens) -> None: ...
    def end(self, end: TurnEnd) -> None: ...


@dataclass
class Collector:
    """A sink that keeps the reply in memory."""

    started: TurnStart | None = None
    steps: list[Step] = field(default_factory=list)
    lenses: list[Lens] = field(default_factory=list)
    ended: TurnEnd | None = None

    def start(self, start: TurnStart) -> None:
        self.started = start

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def lens(self, lens: Lens) -> None:
        self.lenses.append(lens)

    def end(self, end: TurnEnd) -> None:
        self.ended = end


def never() -> bool:
    """The default for ``should_stop``."""
    return False


def prepare(model: Any, tokenizer: Any, sinks: Sequence[Sink]) -> Instrument:
    """The model's instrument; the sinks of the reply it is for are told when there is none.

    Raises CaptureError for a model that cannot be traced.
    """

    def end(status: Status, reason: str) -> None:
        for sink in sinks:
            sink.end(TurnEnd(status, "", reason, 0.0))

    report_activity(Activity.CHECKING)
    with _ending(end):
        return instrument(model, tokenizer)


def trace_turn(
    made: Instrument,
    model_id: str,
    messages: Sequence[ChatMessage],
    sampling: Sampling,
    policy: CapturePolicy,
    sinks: Sequence[Sink],
    *,
    should_stop: Callable[[], bool] = never,
    on_text: OnText | None = None,
    template: TemplateOptions | None = None,
) -> TurnEnd:
    """Decode the assistant's next message and hand every step to the sinks.

    ``should_stop`` is asked after every step; ``on_text`` gets the reply's text in
    whole characters, what is left of one at the end, each piece with the kind of part
    that it belongs to. ``template`` is given to the chat template. Raises
    CaptureError, with the sinks told, when the turn fails; everything decoded
    until then has been handed over.
    """
    turn = _Turn(made.tokenizer, sinks, on_text)
    with _ending(turn.end), lock_model(made.model):
        prompt = render(made.tokenizer, messages, made.vocabulary, template)
        require_embeddings(made.model, prompt.token_ids, made.vocabulary)
        turn.replies_to(prompt, template)
        generation = resolve_generation(made.model, sampling, len(prompt))
        report_activity(Activity.DECODING)
        turn.start(TurnStart(model_id, prompt, generation, made.report(policy)))
        turn.follow(capture(made, prompt, generation, policy, should_stop))
        if turn.reason == "token limit" and generation.max_new_tokens < sampling.max_new_tokens:
            turn.reason = "context full"
    if turn.checks is not None and turn.checks.fault is not None:
        forget(made.model)
    stopped = turn.reason == "stopped"
    return turn.end(Status.STOPPED if stopped else Status.COMPLETE, turn.reason)


@contextmanager
def _ending(end: Callable[[Status, str], object]) -> Iterator[None]:
    """End the reply with the reason when the body raises; what goes on is an OkiTraceError."""
    try:
        yield
    except OkiTraceError as error:
        end(Status.FAILED, str(error))
        raise
    except INTERRUPTIONS:
        end(Status.STOPPED, "interrupted by the user")
        raise
    except BaseException as error:
        reason = _explain(error)
        end(Status.FAILED, reason)
        raise CaptureError(reason) from error


def _explain(error: BaseException) -> str:
    """One line for an exception that a model's own code raised while decoding."""
    if is_out_of_memory(error):
        return "Out of memory while decoding. Shorten the prompt, or load the model in 4-bit."
    if not isinstance(error, Exception):  # a panic of the tokenizer's Rust code
        return f"The model's tokenizer failed ({summary(error)}). Change the message, or the model."
    return (
        f"The model failed ({summary(error)}). "
        "Run it with --debug to see where, or try another model."
    )


class _Turn:
    """The reply so far: what its end will say."""

    def __init__(self, tokenizer: Any, sinks: Sequence[Sink], on_text: OnText | None) -> None:
        self._sinks = sinks
        self._text = ReplyText(tokenizer)
        self._on_text = on_text
        self._began = time.perf_counter()
        self.reason = "token limit"
        self.checks: ReplyChecks | None = None

    def replies_to(self, prompt: Prompt, template: TemplateOptions | None) -> None:
        self._text.replies_to(prompt.text, template.tools if template else ())

    def start(self, start: TurnStart) -> None:
        for sink in self._sinks:
            sink.start(start)

    def follow(self, events: Iterator[tuple[Step, str | None] | Lens | ReplyChecks]) -> None:
        for event in events:
            if isinstance(event, ReplyChecks):
                self.checks = event
                continue
            if isinstance(event, Lens):
                for sink in self._sinks:
                    sink.lens(event)
                continue
            step, finished = event
            self._text.push(step)
            for sink in self._sinks:
                sink.step(step)
            if self._on_text is not None:
                self._tell(self._text.fresh())
            self.reason = finished or self.reason

    def end(self, status: Status, reason: str) -> TurnEnd:
        seconds = time.perf_counter() - self._began
        output, parts = self._text.finish()
        end = TurnEnd(status, output, reason, seconds, self.checks, parts)
        for sink in self._sinks:
            sink.end(end)
        if self._on_text is not None:
            self._tell(self._text.rest())
        return end

    def _tell(self, pieces: Iterable[tuple[str, PartKind]]) -> None:
        assert self._on_text is not None
        for piece in pieces:
            self._on_text(*piece)
