"""Conversations and traces from JSON: a document, lines, a trace, or a list of traces.

One step is in memory at a time. A document whose names stand in the order in
which they are exported is read once, from its start to its end; of any other,
and of version 1, what comes too early is passed over first and read later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

from oki_trace.exchange import schema
from oki_trace.exchange.json_export import JSONL
from oki_trace.exchange.reading.json_stream import JsonStream
from oki_trace.exchange.reading.replies import Survey, TokenIds, turn_start
from oki_trace.exchange.reading.staging import Staging
from oki_trace.exchange.reading.steps import step_record, tensor_records
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.tensor_file import TensorFile
from oki_trace.exchange.trace_object import FORMAT, VERSION
from oki_trace.queueing import title_of
from oki_trace.records import Role, Status, Step, TensorRecord

Json = dict[str, Any]
# Is given an object without its long part, and whether there is one: then the stream stands at it.
Use = Callable[[Json, bool], None]

_DOCUMENT = {"conversation", *schema.Document.__annotations__}
_MESSAGE = set(schema.Message.__annotations__)
_TRACE = set(schema.Trace.__annotations__)
# What an export writes before each long part; nothing that matters follows it there.
_BEFORE = {
    "messages": {"format", "version", "conversation"},
    "trace": {"id", "role", "content", "status", "created_at", "seconds", "tokens"},
    "steps": _TRACE,
}


class _OutOfOrder(Exception):
    """The names do not stand in the order of an export."""


class JsonImport:
    """One file into ``staging``; ``tensors`` stand beside it."""

    def __init__(
        self, stream: JsonStream, staging: Staging, tensors: TensorFile | None = None
    ) -> None:
        self._stream = stream
        self._staging = staging
        self._tensors = tensors
        self._start(in_order=True)

    def run(self) -> None:
        """Read it all. Raises ExchangeError."""
        try:
            self._run()
        except _OutOfOrder:
            self._staging.clear()
            self._stream.seek(0)
            self._start(in_order=False)
            self._run()
        if self._tensors and self._tensors_seen != len(self._tensors):
            raise refused("the file of tensors has some that belong to no step")

    def _start(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._tensors_seen = 0
        # What the conversation under way has said, for a trace that goes on with it.
        self._said: list[tuple[Role, str]] = []
        self._lines: _Lines | None = None

    def _run(self) -> None:
        first = self._stream.peek()
        if first == "[":
            for _ in self._stream.elements():
                self._read("the trace", _TRACE, "steps", self._alone)
        elif first == "{" and self._in_order:
            self._in_export_order()
        elif first == "{":
            self._in_any_order()
        else:
            raise self._stream.wrong("it is not JSON of oki-trace")
        self._stream.end()

    # ------------------------------------------------------------- a conversation

    def _in_export_order(self) -> None:
        """A document or a trace, read as it comes. Raises _OutOfOrder for any other."""
        head: Json = {}
        done = False
        for name in self._stream.items():
            if done and (name in _DOCUMENT or name in _TRACE):
                raise _OutOfOrder
            if name == "messages" and "conversation" in head:
                if "layout" in head or not head.keys() >= _BEFORE["messages"]:
                    raise _OutOfOrder
                self._conversation(head)
                done = True
            elif name == "steps":
                if "conversation" in head or not head.keys() >= _BEFORE["steps"]:
                    raise _OutOfOrder
                self._alone(head, True)
                done = True
            elif name in _DOCUMENT or name in _TRACE:
                head[name] = self._stream.value()
            else:
                self._stream.skip()
        if not done:
            raise _OutOfOrder

    def _in_any_order(self) -> None:
        """A document, lines or a trace: where each name stands comes first."""
        places: dict[str, int] = {}
        for name in self._stream.items():
            if name in _DOCUMENT or name == "messages":
                places[name] = self._stream.tell()
            self._stream.skip()
        end = self._stream.tell()
        if "conversation" not in places:
            self._stream.seek(0)
            self._read("the trace", _TRACE, "steps", self._alone)
            return
        head = {name: self._value_at(places[name]) for name in _DOCUMENT & places.keys()}
        if head.get("layout") == JSONL:
            self._lines = _Lines(self._stream, end)
        if "messages" in places:
            self._stream.seek(places["messages"])
            self._conversation(head)
        else:
            self._begin(head)
        self._stream.seek(end)
        if self._lines is not None:
            self._lines.end()

    def _value_at(self, place: int) -> Any:
        self._stream.seek(place)
        return self._stream.value()

    def _begin(self, head: Json) -> None:
        _check_version(head, "the document")
        found = schema.read(schema.Conversation, head["conversation"] or {}, "the conversation")
        self._staging.begin(found)

    def _conversation(self, head: Json) -> None:
        """The document whose messages come next."""
        self._begin(head)
        for _ in self._elements("the document", "messages"):
            self._read(f"message {self._staging.messages + 1}", _MESSAGE, "trace", self._message)

    def _message(self, values: Json, traced: bool) -> None:
        where = f"message {self._staging.messages + 1}"
        message = schema.read(schema.Message, values, where)
        if not traced or self._is_null():
            self._staging.say(message, where)
            return

        def reply(trace: Json, stepped: bool) -> None:
            self._reply(message, self._trace(trace, f"{where}, trace"), stepped, where)

        self._read(f"{where}, trace", _TRACE, "steps", reply)

    # -------------------------------------------------------------------- a reply

    def _trace(self, values: Json, where: str) -> schema.Trace:
        _check_version(values, where)
        return schema.read(schema.Trace, values, where)

    def _alone(self, values: Json, stepped: bool) -> None:
        """A trace by itself: what was said before it, then its reply.

        It goes on with the conversation before it where it begins with all of that.
        """
        where = "the trace"
        if values.get("output") is None and values.get("prompt") is None:
            raise refused("it is no trace: it has neither a prompt nor an output")
        trace = self._trace(values, where)
        if self._in_order and not trace.get("capture"):
            # Its steps tell what its head does not.
            raise _OutOfOrder
        told: list[schema.Said] = list(trace.get("messages") or ())
        if not told and trace.get("prompt"):
            told = [{"role": Role.USER, "content": trace["prompt"] or ""}]
        said = [(one["role"], one["content"]) for one in told]
        if not self._said or said[: len(self._said)] != self._said:
            last = next((content for role, content in reversed(said) if role is Role.USER), "")
            self._staging.begin({"title": title_of(last)})
            self._said = []
        for one in told[len(self._said) :]:
            self._staging.say(_before(one), f"{where}, messages")
        output = trace.get("output") or ""
        reply: schema.Message = {
            "role": Role.ASSISTANT,
            "content": output,
            "status": trace.get("status") or Status.COMPLETE,
            "reason": trace.get("reason"),
        }
        self._reply(reply, trace, stepped, where)
        self._said = [*said, (Role.ASSISTANT, output)]

    def _reply(
        self, message: schema.Message, trace: schema.Trace, stepped: bool, where: str
    ) -> None:
        """A reply; the stream stands at its steps, if it is ``stepped``."""
        survey = None if trace.get("capture") else self._survey(stepped, where)
        ids = TokenIds(survey.chosen if survey else None)
        start = turn_start(trace, ids, survey, f"{where}, trace")
        first = survey.first if survey else 0
        message["checks"] = trace.get("checks")
        message["parts"] = trace.get("parts")
        message["template"] = trace.get("template") or message.get("template")
        number = message.get("id")
        values = self._lines.of(number, where) if self._lines else self._steps(stepped, where)

        def records() -> Iterator[Step]:
            for index, value in enumerate(values):
                here = f"{where}, step {index}"
                read = schema.read(schema.Step, value, here)
                step = step_record(read, index, start, ids, first, here)
                tensors = self._tensors_of(number, index)
                yield replace(step, tensors=tensor_records(tensors, step, start.capture, here))

        kept = self._tensors is not None and number is not None and self._tensors.has(number)
        self._staging.reply(message, start, records(), where, tensors=kept)

    def _survey(self, stepped: bool, where: str) -> Survey:
        """All steps of version 1, looked at once before they are read."""
        if self._lines is not None or self._in_order:
            raise refused(f"{where}, trace: capture is missing")
        place = self._stream.tell()
        survey = Survey()
        for value in self._steps(stepped, where):
            survey.add(schema.read(schema.Step, value, f"{where}, step {survey.steps}"))
        self._stream.seek(place)
        return survey

    def _steps(self, stepped: bool, where: str) -> Iterator[Any]:
        if stepped and not self._is_null():
            for _ in self._elements(where, "steps"):
                yield self._stream.value()

    def _tensors_of(self, message: int | None, step_index: int) -> tuple[TensorRecord, ...]:
        if self._tensors is None or message is None:
            return ()
        tensors = tuple(self._tensors.of_step(message, step_index))
        self._tensors_seen += len(tensors)
        return tensors

    # ------------------------------------------------------------------- within

    def _read(self, where: str, names: set[str], part: str, use: Use) -> None:
        """Read the ``names`` of an object and ``use`` them, its long ``part`` yet unread."""
        if self._stream.peek() != "{":
            raise refused(f"{where} is no object")
        head: Json = {}
        used, place = False, None
        for name in self._stream.items():
            if name == part and not self._in_order:
                place = self._stream.tell()
                self._stream.skip()
            elif name == part:
                if not head.keys() >= _BEFORE[part]:
                    raise _OutOfOrder
                use(head, True)
                used = True
            elif name not in names:
                self._stream.skip()
            elif used:
                raise _OutOfOrder
            else:
                head[name] = self._stream.value()
        if place is not None:
            end = self._stream.tell()
            self._stream.seek(place)
            use(head, True)
            self._stream.seek(end)
        elif not used and self._in_order and part == "steps":
            # They may stand in lines, which is said further on.
            raise _OutOfOrder
        elif not used:
            use(head, False)

    def _elements(self, where: str, name: str) -> Iterator[None]:
        if self._stream.peek() != "[":
            raise refused(f"{where}: {name} is no list")
        return self._stream.elements()

    def _is_null(self) -> bool:
        """Whether null comes next, which is as good as nothing."""
        return self._stream.peek() == "n" and self._stream.value() is None


class _Lines:
    """The steps of all replies, a line each, after the first line."""

    def __init__(self, stream: JsonStream, place: int) -> None:
        self._stream = stream
        self._place = place
        self._next: Any = None

    def of(self, number: int | None, where: str) -> Iterator[Any]:
        """The steps of one reply. The stream stands afterwards where it stood before."""
        if number is None:
            raise refused(f"{where}: id is missing")
        here = self._stream.tell()
        self._stream.seek(self._place)
        while self._next is not None or self._stream.peek():
            line = self._stream.value() if self._next is None else self._next
            self._next = line
            if schema.read(schema.Line, line, "a line")["message"] != number:
                break
            self._next = None
            yield line
        self._place = self._stream.tell()
        self._stream.seek(here)

    def end(self) -> None:
        """Every line has to be of a reply."""
        self._stream.seek(self._place)
        if self._next is not None or self._stream.peek():
            raise refused("a line is of no message, or out of order")


def _check_version(values: Json, where: str) -> None:
    """Version 1 says nothing of itself; a later one than ours is refused."""
    said = schema.read(schema.Document, values, where)
    if (said.get("format") or FORMAT) != FORMAT:
        raise refused(f"{where} is of another format")
    version = said.get("version") or 1
    if version > VERSION:
        raise refused(
            f"it is of version {version}, this program knows {VERSION}: upgrade oki-trace"
        )


def _before(said: schema.Said) -> schema.Message:
    """A message before a trace. Its own steps are not there, so its parts have none."""
    parts = [
        {name: value for name, value in part.items() if name not in ("start", "end")}
        for part in said.get("parts") or ()
    ]
    return {
        "role": said["role"],
        "content": said["content"],
        "parts": cast("list[schema.Part]", parts) or None,
        "tool_name": said.get("tool_name"),
    }
