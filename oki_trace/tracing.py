"""One traced turn: from the messages of a conversation to a finished reply.

A sink takes the reply as it grows: the store's recorder, or a list. Every reply that
starts also ends in all its sinks, with the reason if it fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from oki_trace.errors import CaptureError, OkiTraceError
from oki_trace.llm.capture.fingerprint import runs_own_code
from oki_trace.llm.capture.instrument import Instrument, forget, instrument
from oki_trace.llm.capture.pipeline import capture, rest_of
from oki_trace.llm.capture.teacher_forcing import (
    GivenLenses,
    NoGivenSteps,
    Windows,
    runs_in_chunks,
    teacher_force,
    waiting_room,
)
from oki_trace.llm.capture.vocabulary import require_embeddings
from oki_trace.llm.chat.prompt import render
from oki_trace.llm.chat.reply_text import ReplyText
from oki_trace.llm.chat.typed_text import typed_ids
from oki_trace.llm.decoding.generation import require_context, resolve_generation
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.llm.failures import INTERRUPTIONS, is_out_of_memory, summary
from oki_trace.llm.loading.activity import Activity, report_activity
from oki_trace.records import (
    CapturePolicy,
    CaptureReport,
    ChatMessage,
    Forced,
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

# Tokens of a prompt that a light trace runs in one piece, where a model cannot run in chunks.
ONE_PIECE = 256

# A piece of the reply's text and the kind of its part.
OnText = Callable[[str, PartKind], None]


class Sink(Protocol):
    """Takes a reply as it grows: ``start`` once, steps and lenses, then ``end`` once."""

    def start(self, start: TurnStart) -> None: ...
    def step(self, step: Step) -> None: ...
    def lens(self, lens: Lens) -> None: ...
    def end(self, end: TurnEnd) -> None: ...


@dataclass(frozen=True)
class ReplyPrefix:
    """The beginning of a reply: the last ``prefix_len`` tokens of ``prompt``."""

    prompt: Prompt
    prefix_len: int


@dataclass
class Collector:
    """A sink that keeps the reply in memory."""

    started: TurnStart | None = None
    prompt_steps: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    lenses: list[Lens] = field(default_factory=list)
    ended: TurnEnd | None = None

    def start(self, start: TurnStart) -> None:
        self.started = start

    def step(self, step: Step) -> None:
        (self.prompt_steps if step.origin == "given" else self.steps).append(step)

    def lens(self, lens: Lens) -> None:
        self.lenses.append(lens)

    def end(self, end: TurnEnd) -> None:
        self.ended = end


def never() -> bool:
    """The default for ``should_stop``."""
    return False


def _nothing(prompt: Prompt) -> int:
    """The default for ``traced_before``."""
    return 0


def prepare(model: Any, tokenizer: Any, sinks: Sequence[Sink]) -> Instrument:
    """The model's instrument. Raises CaptureError, and ends the reply, if it cannot be traced."""

    def end(status: Status, reason: str) -> None:
        for sink in sinks:
            sink.end(TurnEnd(status, "", reason, 0.0))

    report_activity(Activity.CHECKING)
    with _ending(end):
        return instrument(model, tokenizer)


def trace_turn(
    handle: Instrument,
    model_id: str,
    messages: Sequence[ChatMessage],
    sampling: Sampling,
    policy: CapturePolicy,
    sinks: Sequence[Sink],
    *,
    should_stop: Callable[[], bool] = never,
    on_text: OnText | None = None,
    template: TemplateOptions | None = None,
    traced_before: Callable[[Prompt], int] = _nothing,
    prefix: ReplyPrefix | None = None,
    forced: Forced | None = None,
    reuse: bool = False,
) -> TurnEnd:
    """Decode the assistant's next message and pass every step to the sinks.

    ``prefix`` takes the place of ``messages``: the reply goes on from there. ``forced``
    are its first tokens, and the sampling's number of tokens counts from after them.
    ``reuse``: tokens that the last reply's KV cache holds do not run again.

    ``should_stop`` is called after every step. ``on_text`` gets the text in whole
    characters, each piece with the kind of its part; the rest of an incomplete
    character comes at the end. ``template`` goes to the chat template. ``traced_before``
    returns the length of the prompt's beginning that is traced elsewhere. Raises
    CaptureError when the turn fails; the sinks then have all steps before it, and the
    end with its reason.
    """
    turn = _Turn(handle.tokenizer, sinks, on_text)
    with _ending(turn.end), lock_model(handle.model):
        if prefix is None:
            prompt = render(handle.tokenizer, messages, handle.vocabulary, template)
        else:
            prompt = prefix.prompt
        prefix_len = 0 if prefix is None else prefix.prefix_len
        first_ids = () if forced is None else _token_ids(handle.tokenizer, forced)
        require_embeddings(handle.model, (*prompt.token_ids, *first_ids), handle.vocabulary)
        tools = template.tools if template else ()
        text = turn.text.replies_to(prompt, tools, prefix_len, handle.vocabulary)
        generation = resolve_generation(handle.model, sampling, len(prompt) + len(first_ids))
        report_activity(Activity.DECODING)
        first = len(prompt) if policy.trace_prompt is None else max(traced_before(prompt), 1)
        policy, note = _affordable(handle, policy, len(prompt) - first, len(prompt))
        report = handle.report(policy)
        if reuse:
            report = _with_reuse(report, handle, prompt)
        for sink in sinks:
            sink.start(TurnStart(model_id, prompt, generation, report, prefix_len, text))
        given, reused = None, report.reused if reuse else None
        if note is not None:
            turn.checks = ReplyChecks((), notes=(note,))
        if policy.trace_prompt is not None:
            given = GivenLenses(handle, policy.for_prompt)
            try:
                turn.follow_given(handle, prompt, given.policy, first, should_stop, later=given)
            except NoGivenSteps as error:
                if policy.trace_prompt == "full":
                    raise
                given.reducer.checker.note(f"the prompt was not traced: {error}")
            turn.began = time.perf_counter()  # the time of a reply is that of its decoding
        if turn.reason != "stopped":
            rest = (should_stop, first_ids, reused, given)
            turn.follow(capture(handle, prompt, generation, policy, *rest))
        elif given is not None:
            turn.follow(rest_of(given))
        if turn.reason == "token limit" and generation.max_new_tokens < sampling.max_new_tokens:
            turn.reason = "context full"
    turn.forget_if_wrong(handle)
    stopped = turn.reason == "stopped"
    return turn.end(Status.STOPPED if stopped else Status.COMPLETE, turn.reason)


# Rows of a lens without a draft that take less than a tenth of a turn of 128 tokens on a CPU.
_EXACT_ROWS = 1000


def _affordable(
    handle: Instrument, policy: CapturePolicy, new_tokens: int, tokens: int
) -> tuple[CapturePolicy, str | None]:
    """The policy for a prompt of so many tokens, and why it is less than was asked for.

    A light trace shall not delay the reply: its lens is computed meanwhile, so it is left out
    where there is no room for so many steps, or where every layer needs the whole head because
    nothing drafts it. Only ``lens_layers`` asks for it in any case.
    """
    room = waiting_room(handle)
    if policy.trace_prompt != "light" or policy.lens_layers is not None or new_tokens <= 0:
        return policy, None
    if tokens > max(room, ONE_PIECE) and not runs_in_chunks(handle):
        note = f"the prompt was not traced: {tokens:,} tokens take much memory in one piece"
        return replace(policy, trace_prompt=None), note
    if policy.no_lens or handle.lens.projection is None:
        return policy, None
    on_cpu = handle.model.device.type == "cpu"
    rows = new_tokens * handle.structure.layers
    if on_cpu and handle.fast.draft_lens is None and rows > _EXACT_ROWS:
        note = "the lens did not read the prompt: without a draft, that would delay the reply"
        return replace(policy, lens_layers="none"), note
    if new_tokens <= room:
        return policy, None
    note = f"the lens did not read the prompt, whose {new_tokens:,} tokens would delay the reply"
    return replace(policy, lens_layers="none"), note


def _with_reuse(report: CaptureReport, handle: Instrument, prompt: Prompt) -> CaptureReport:
    """The report with the number of tokens that need not run again."""
    tokens, reason = handle.fast.shared_prefix(prompt.token_ids)
    if tokens and not runs_in_chunks(handle):
        tokens, reason = 0, "the model's cache does not continue a text exactly"
    if tokens and not runs_own_code(handle.model):
        tokens, reason = 0, "hooks or replaced code may change what the model computes"
    return replace(report, reused=tokens, not_reused=reason)


def _token_ids(tokenizer: Any, forced: Forced) -> tuple[int, ...]:
    """The forced tokens. Raises CaptureError for a text that has none."""
    return forced.token_ids if forced.text is None else typed_ids(tokenizer, forced.text)


def trace_text(
    handle: Instrument,
    model_id: str,
    prompt: Prompt,
    policy: CapturePolicy,
    sinks: Sequence[Sink],
    *,
    output: str = "",
    first: int = 1,
    windows: Windows | None = None,
    should_stop: Callable[[], bool] = never,
) -> TurnEnd:
    """Trace a given text without generating: every token from position ``first`` on is a step.

    ``output`` is the text that the message is stored with. Raises CaptureError as
    ``trace_turn`` does, and for a text that is longer than the model's context if there
    are no ``windows``.
    """
    turn = _Turn(handle.tokenizer, sinks, None)
    turn.output = output
    with _ending(turn.end), lock_model(handle.model):
        require_embeddings(handle.model, prompt.token_ids, handle.vocabulary)
        require_context(handle.model, len(prompt), windows.length if windows else None)
        generation = resolve_generation(handle.model, Sampling(max_new_tokens=0), 0)
        report_activity(Activity.DECODING)
        policy = replace(policy, trace_prompt=policy.trace_prompt or "full")
        report = handle.report(policy)
        pair = None if windows is None else (windows.length, windows.stride)
        for sink in sinks:
            sink.start(TurnStart(model_id, prompt, generation, replace(report, windows=pair)))
        turn.reason = "scored"
        turn.follow_given(handle, prompt, policy.for_prompt, first, should_stop, windows=windows)
    turn.forget_if_wrong(handle)
    return turn.end(Status.STOPPED if turn.reason == "stopped" else Status.COMPLETE, turn.reason)


@contextmanager
def _ending(end: Callable[[Status, str], object]) -> Iterator[None]:
    """End the reply with the reason when the body raises, and raise an OkiTraceError."""
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
    """One line for an error that a model's own code raised while decoding."""
    if is_out_of_memory(error):
        return "Out of memory while decoding. Shorten the prompt, or load the model in 4-bit."
    if not isinstance(error, Exception):  # a panic in the tokenizer's Rust code
        return f"The model's tokenizer failed ({summary(error)}). Change the message, or the model."
    return (
        f"The model failed ({summary(error)}). "
        "Run it with --debug to see where, or try another model."
    )


class _Turn:
    """The reply so far, and why it ended."""

    def __init__(self, tokenizer: Any, sinks: Sequence[Sink], on_text: OnText | None) -> None:
        self._sinks = sinks
        self.text = ReplyText(tokenizer)
        self._on_text = on_text
        self.began = time.perf_counter()
        self.reason = "token limit"
        self.output = ""
        self.checks: ReplyChecks | None = None

    def follow(self, events: Iterator[tuple[Step, str | None] | Step | Lens | ReplyChecks]) -> None:
        for event in events:
            if isinstance(event, ReplyChecks):
                self.checks = event if self.checks is None else event.after(self.checks)
            elif isinstance(event, Step):
                for sink in self._sinks:
                    sink.step(event)
            elif isinstance(event, Lens):
                for sink in self._sinks:
                    sink.lens(event)
            else:
                step, end_reason = event
                self.text.push(step)
                for sink in self._sinks:
                    sink.step(step)
                self._send(self.text.fresh)
                self.reason = end_reason or self.reason

    def follow_given(
        self,
        handle: Instrument,
        prompt: Prompt,
        policy: CapturePolicy,
        first: int,
        should_stop: Callable[[], bool],
        **options: Any,
    ) -> None:
        """Trace the given tokens from position ``first`` on; see ``teacher_force``."""

        def stop() -> bool:
            if should_stop():
                self.reason = "stopped"
            return self.reason == "stopped"

        options |= {"first": first, "should_stop": stop}
        self.follow(teacher_force(handle, prompt.token_ids, policy, **options))

    def forget_if_wrong(self, handle: Instrument) -> None:
        """Have the model checked again before its next trace if a check has failed."""
        if self.checks is not None and self.checks.fault is not None:
            forget(handle.model)

    def end(self, status: Status, reason: str) -> TurnEnd:
        seconds = time.perf_counter() - self.began
        output, parts = self.text.finish()
        output = output or self.output
        end = TurnEnd(status, output, reason, seconds, self.checks, parts)
        for sink in self._sinks:
            sink.end(end)
        self._send(self.text.rest)
        return end

    def _send(self, pieces: Callable[[], Iterable[tuple[str, PartKind]]]) -> None:
        if self._on_text is not None:
            for piece in pieces():
                self._on_text(*piece)
