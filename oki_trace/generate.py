"""Generates a queued reply and stores each step as soon as it is decoded.

``run_traced``, the command line and the worker all use this module, so a reply is
stored in the same way whoever requested it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from oki_trace.errors import CaptureError, NotFound
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.markers import format_of
from oki_trace.llm.chat.parts import ReplyToken, answer_of, parts_of
from oki_trace.queueing import history
from oki_trace.records import ChatMessage, Message, Prompt, Segment, Status, TurnEnd
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from oki_trace.tracing import OnText, ReplyPrefix, Sink, never, prepare, trace_turn


class ReadyModel(Protocol):
    """A model, its tokenizer, and the name that its traces give it."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def model_id(self) -> str: ...


def generate_reply(
    writer: TraceWriter,
    reader: TraceReader,
    reply: Message,
    loaded: ReadyModel,
    *,
    messages: Sequence[ChatMessage] | None = None,
    sinks: Sequence[Sink] = (),
    should_stop: Callable[[], bool] = never,
    on_text: OnText | None = None,
) -> TurnEnd:
    """Decode the queued ``reply`` into the store, and into ``sinks``.

    ``messages`` are given to the model in place of the stored conversation. Raises
    CaptureError or StoreError on failure; the reply is then stored as ``failed`` with
    the reason, and keeps all steps before it.
    """
    assert reply.sampling is not None and reply.policy is not None
    recorder = Recorder(writer, reply.id)
    all_sinks = [*sinks, recorder]
    instrument = prepare(loaded.model, loaded.tokenizer, all_sinks)
    prefix = None
    if reply.branch_of is not None:
        prefix = _prefix_of(reader, reply, instrument.vocabulary, all_sinks)
    elif messages is None:
        messages = history(_with_parts(reader, reply, loaded), reply.id)
    return trace_turn(
        instrument,
        loaded.model_id,
        messages or (),
        reply.sampling,
        reply.policy,
        all_sinks,
        should_stop=lambda: should_stop() or recorder.stop_requested,
        on_text=on_text,
        template=reply.template,
        traced_before=lambda prompt: max(reader.traced_prefix(reply, prompt.token_ids)[1], 1),
        prefix=prefix,
        forced=reply.forced,
        reuse=True,
    )


def _prefix_of(
    reader: TraceReader, branch: Message, vocabulary: Vocabulary, sinks: Sequence[Sink]
) -> ReplyPrefix:
    """The prompt of the reply that is departed from, and its tokens up to the fork."""
    assert branch.branch_of is not None
    step = branch.branch_step or 0
    try:
        origin = reader.message(branch.branch_of)
        prompt = reader.prompt(origin.id)
        kept = reader.steps(origin.id)[:step]
        if len(kept) < step:
            raise CaptureError(f"Message {origin.id} has {len(kept)} tokens, not {step}.")
        ids = (*prompt.token_ids, *(one.token_id for one in kept))
        tokens = (*prompt.tokens, *(one.token for one in kept))
        if any(vocabulary.text(i) != token for i, token in zip(ids, tokens, strict=True)):
            raise CaptureError(
                f"Message {origin.id} has the tokens of another model. Branch from it with "
                f"--model {origin.model_id}."
            )
    except (CaptureError, NotFound) as error:
        for sink in sinks:
            sink.end(TurnEnd(Status.FAILED, "", str(error), 0.0))
        raise
    text = b"".join(one.token_bytes for one in kept).decode("utf-8", errors="replace")
    of_kept: tuple[Segment, ...] = tuple("assistant" for _ in kept)
    whole = Prompt(prompt.text + text, ids, tokens, prompt.segments + of_kept)
    return ReplyPrefix(whole, origin.prefix_len + step)


def _with_parts(reader: TraceReader, reply: Message, loaded: ReadyModel) -> list[Message]:
    """The conversation; parts that are not stored are read from the reply's tokens.

    A killed process and an older program leave a reply as one text.
    """
    form = format_of(loaded.tokenizer)
    messages = reader.messages(reply.conversation_id)
    if form.is_plain and getattr(loaded.tokenizer, "chat_template", None):
        return messages
    completed = []
    for message in messages:
        known = message.parts or not message.tokens or message.model_id != loaded.model_id
        if message.id != reply.id and not known and not message.status.is_live:
            tokens = [ReplyToken(s.token_bytes, s.is_special) for s in reader.steps(message.id)]
            tools = message.template.tools if message.template else ()
            parts = parts_of(form, reader.prompt(message.id).text, tokens, tools)
            is_plain = [part.kind for part in parts] == ["answer"]
            content = message.content if is_plain else answer_of(parts)
            message = replace(message, parts=parts, content=content)
        completed.append(message)
    return completed
