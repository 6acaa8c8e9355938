"""Answering a request from the store: every step is on disk as it is decoded.

The command line and the worker both go through here, so a reply asked for in
the explorer and one asked for in a terminal are kept in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

from oki_trace.asking import history
from oki_trace.llm.load import LoadedModel
from oki_trace.records import Message, TurnEnd
from oki_trace.store.reader import TraceReader
from oki_trace.store.recorder import Recorder
from oki_trace.store.writer import TraceWriter
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
        history(reader.messages(reply.conversation_id), reply.id),
        reply.sampling,
        reply.policy,
        [recorder],
        should_stop=lambda: should_stop() or recorder.stop_requested,
        on_text=on_text,
        template=reply.template,
    )
