"""Answering a request from the store: every step is on disk as it is decoded.

The command line and the worker both go through here, so a reply asked for in
the explorer and one asked for in a terminal are kept in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from oki_trace.llm.chat.markers import format_of
from oki_trace.llm.chat.parts import ReplyToken, answer_of, parts_of
from oki_trace.llm.loading.load import LoadedModel
from oki_trace.queueing import history
from oki_trace.records import Message, TurnEnd
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from oki_trace.tracing import OnText, never, prepare, trace_turn


def answer(
    writer: TraceWriter,
    reader: TraceReader,
    reply: Message,
    loaded: LoadedModel,
    *,
    should_stop: Callable[[], bool] = never,
    on_text: OnText | None = None,
) -> TurnEnd:
    """Decode the queued ``reply`` into the store.

    Raises CaptureError or StoreError when it fails; the reply then ends as
    ``failed`` with the reason, all steps before kept.
    """
    assert reply.sampling is not None and reply.policy is not None
    recorder = Recorder(writer, reply.id)
    return trace_turn(
        prepare(loaded.model, loaded.tokenizer, [recorder]),
        loaded.model_id,
        history(_with_parts(reader, reply, loaded), reply.id),
        reply.sampling,
        reply.policy,
        [recorder],
        should_stop=lambda: should_stop() or recorder.stop_requested,
        on_text=on_text,
        template=reply.template,
    )


def _with_parts(reader: TraceReader, reply: Message, loaded: LoadedModel) -> list[Message]:
    """The conversation, the parts of its replies read from their tokens where none are kept.

    A process that was killed, and an older program, leave a reply as one text.
    """
    form = format_of(loaded.tokenizer)
    messages = reader.messages(reply.conversation_id)
    if form.is_plain and getattr(loaded.tokenizer, "chat_template", None):
        return messages
    made = []
    for message in messages:
        known = message.parts or not message.tokens or message.model_id != loaded.model_id
        if message.id != reply.id and not known and not message.status.is_live:
            tokens = [ReplyToken(s.token_bytes, s.is_special) for s in reader.steps(message.id)]
            tools = message.template.tools if message.template else ()
            parts = parts_of(form, reader.prompt(message.id).text, tokens, tools)
            whole = [part.kind for part in parts] == ["answer"]
            content = message.content if whole else answer_of(parts)
            message = replace(message, parts=parts, content=content)
        made.append(message)
    return made
