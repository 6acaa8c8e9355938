"""Scores a given text: the probability of each token by a model, without generating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from oki_trace.errors import CaptureError
from oki_trace.generate import ReadyModel
from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.teacher_forcing import Windows
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.prompt import render, text_prompt
from oki_trace.llm.decoding.generation import require_context
from oki_trace.queueing import history, title_of
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Message,
    ModelChoice,
    Prompt,
    Role,
    Sampling,
    Segment,
    Step,
)
from oki_trace.tracing import Collector, Sink, never, prepare, trace_text

if TYPE_CHECKING:
    from oki_trace.reporting import Progress
    from oki_trace.store.reading.reader import Reader
    from oki_trace.store.writing.writer import TraceWriter


@dataclass(frozen=True)
class GivenText:
    """The input of a model: its tokens, of which those from ``first`` on are scored.

    ``content`` is the text of the stored message.
    """

    prompt: Prompt
    content: str
    first: int = 1

    def __post_init__(self) -> None:
        if not self.prompt.token_ids:
            raise CaptureError("The text has no tokens. Give it some text.")
        if len(self.prompt) <= self.first:
            raise CaptureError(
                "The text has one token, and the first token of a text has no score. Give it more "
                "text."
            )


def of_text(tokenizer: Any, vocabulary: Vocabulary, text: str) -> GivenText:
    """A text by itself, without a chat template."""
    return GivenText(text_prompt(tokenizer, text, vocabulary), text)


def of_messages(
    tokenizer: Any, vocabulary: Vocabulary, messages: Sequence[ChatMessage]
) -> GivenText:
    """A conversation in the model's chat template, scored whole."""
    prompt = render(tokenizer, messages, vocabulary)
    return GivenText(prompt, messages[-1].content)


def of_reply(tokenizer: Any, vocabulary: Vocabulary, reader: Reader, reply: Message) -> GivenText:
    """The text of a stored reply in its own prompt; the reply's tokens are scored.

    A model with the same tokenizer gets the same tokens; another one gets the messages in
    its own chat template.
    """
    prompt, steps = reader.prompt(reply.id), reader.steps(reply.id)
    ids = (*prompt.token_ids, *(step.token_id for step in steps))
    tokens = (*prompt.tokens, *(step.token for step in steps))
    if all(vocabulary.text(i) == token for i, token in zip(ids, tokens, strict=True)):
        own: tuple[Segment, ...] = tuple("assistant" for _ in steps)
        text = b"".join(step.token_bytes for step in steps).decode("utf-8", errors="replace")
        whole = Prompt(prompt.text + text, ids, tokens, prompt.segments + own)
        return GivenText(whole, reply.content, len(prompt) - reply.prefix_len)
    before = history(reader.messages(reply.conversation_id), reply.id)
    turns = [*before, ChatMessage(Role.ASSISTANT, reply.content)]
    whole = render(tokenizer, turns, vocabulary, reply.template)
    first = len(whole)
    while first > 1 and whole.segments[first - 1] == "assistant":
        first -= 1
    return GivenText(whole, reply.content, first)


def score_given(
    instrument: Instrument,
    model_id: str,
    given: GivenText,
    policy: CapturePolicy,
    sinks: Sequence[Sink],
    *,
    windows: Windows | None = None,
    should_stop: Callable[[], bool] = never,
) -> None:
    """Trace the given text into ``sinks``. Raises CaptureError."""
    trace_text(
        instrument,
        model_id,
        given.prompt,
        policy,
        sinks,
        output=given.content,
        first=given.first,
        windows=windows,
        should_stop=should_stop,
    )


def score_into_store(
    writer: TraceWriter,
    loaded: ReadyModel,
    choice: ModelChoice,
    policy: CapturePolicy,
    make: Callable[[Instrument], GivenText],
    *,
    of: int | None = None,
    sinks: Sequence[Sink] = (),
    windows: Windows | None = None,
    should_stop: Callable[[], bool] = never,
    progress: Progress | None = None,
    began: Callable[[int], object] = lambda message_id: None,
) -> int:
    """Store a scored text as a conversation of one message; returns the message's id.

    ``make`` gets the model's instrument and returns the text; nothing is stored if it
    raises, or if the text or the policy's layers do not fit the model. ``of``: the message
    whose text it is. ``began`` is called with the message's id before the first token. Raises
    CaptureError.
    """
    from oki_trace.store.writing.recorder import Recorder

    instrument = prepare(loaded.model, loaded.tokenizer, ())
    given = make(instrument)
    require_context(instrument.model, len(given.prompt), windows.length if windows else None)
    policy = replace(policy, trace_prompt="full")
    policy.layers_read(instrument.structure.layers)
    conversation = writer.create_conversation(title_of(f"Score: {given.content.strip()}"))
    request = (choice, Sampling(max_new_tokens=0), policy)
    message = writer.queue_reply(conversation, *request, claim=True, score_of=of)
    began(message)
    recorder = Recorder(writer, message)
    counter = _Counter(progress, len(given.prompt) - given.first)
    score_given(
        instrument,
        loaded.model_id,
        given,
        policy,
        [*sinks, counter, recorder],
        windows=windows,
        should_stop=lambda: should_stop() or recorder.stop_requested,
    )
    return message


class _Counter(Collector):
    """A sink that reports the number of finished tokens and keeps none."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        super().__init__()
        self._progress = progress
        self._total = total
        self._done = 0

    def step(self, step: Step) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
