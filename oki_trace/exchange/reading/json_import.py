"""Imports conversations and traces from JSON: a document, lines, a trace, or a list of traces.

One step is in memory at a time. A document whose names are in the order of an
export is read once, from start to end. In any other, and in version 1, a name
that comes too early is skipped and read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

from oki_trace.exchange.json_export import JSONL
from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.json_stream import JsonStream
from oki_trace.exchange.reading.replies import Survey, TokenIds, turn_start
from oki_trace.exchange.reading.staging import Staging
from oki_trace.exchange.reading.steps import StepReader, check_tensors
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.tensor_file import StepPlace, TensorFile
from oki_trace.exchange.trace_object import FORMAT, VERSION
from oki_trace.queueing import title_of
from oki_trace.records import Role, Status, Step, TensorRecord

Json = dict[str, Any]
# The names of the long parts of an object. When it yields one, the stream is at that part, which
# is read before the next name is asked for.
Parts = Iterator[str]
# Takes an object without its long parts, and what goes through those that it has. An object that
# is not in the order of an export may be gone through several times.
Use = Callable[[Json, Callable[[], Parts]], None]

_DOCUMENT = {"conversation", *validation.Document.__annotations__}
_MESSAGE = set(validation.Message.__annotations__)
_TRACE = set(validation.Trace.__annotations__)
_STEPS = ("steps", "prompt_steps")
# The names that an export writes before each long part; after one it writes long parts alone.
_BEFORE = {
    "messages": {"format", "version", "conversation"},
    "trace": {"id", "role", "content", "status", "created_at", "seconds", "tokens"},
    **dict.fromkeys(_STEPS, _TRACE),
}


class _OutOfOrder(Exception):
    """The names are not in the order of an export."""


class _TraceOutOfOrder(_OutOfOrder):
    """Those of a trace outside a document, as in all of version 1."""


class JsonImport:
    """Reads one file into ``staging``; ``tensors`` is its safetensors file."""

    def __init__(
        self, stream: JsonStream, staging: Staging, tensors: TensorFile | None = None
    ) -> None:
        self._stream = stream
        self._staging = staging
        self._tensors = tensors
        self._in_order = True
        self._tensor_count = 0
        self._surveyed = 0
        # The messages of the conversation under way: a trace may continue it.
        self._history: list[tuple[Role, str]] = []
        self._lines: _Lines | None = None

    def run(self) -> None:
        """Read the whole file. Raises ExchangeError."""
        first = self._stream.peek()
        if first not in ("{", "["):
            raise refused("it is not an oki-trace export")
        try:
            self._list() if first == "[" else self._in_export_order()
        except _OutOfOrder as error:
            self._in_order = False
            self._tensor_count = 0
            self._staging.clear()
            self._history.clear()
            if isinstance(error, _TraceOutOfOrder):
                # Reading that many takes minutes; counting them takes a second.
                self._check_length(self._stream.count("chosen_token", validation.MAX_STEPS + 1))
            self._stream.seek(0)
            self._list() if first == "[" else self._in_any_order()
        self._stream.end()
        if self._tensors and self._tensor_count != len(self._tensors):
            raise refused("the safetensors file has tensors that belong to no step")

    def _check_length(self, steps: int) -> None:
        if steps > validation.MAX_STEPS:
            raise refused(f"its traces have more than {validation.MAX_STEPS:,} steps in total")

    # ------------------------------------------------------------- a conversation

    def _list(self) -> None:
        for _ in self._stream.elements():
            self._trace_alone()

    def _in_export_order(self) -> None:
        """A document or a trace, read from start to end. Raises _OutOfOrder for any other."""
        self._read("the file", _DOCUMENT | _TRACE, (), self._use_file)

    def _use_file(self, head: Json, parts: Callable[[], Parts]) -> None:
        if "conversation" not in head:
            self._use_trace_alone(head, parts)
        elif "layout" in head:
            raise _OutOfOrder
        else:
            for _ in parts():
                self._conversation(head)

    def _in_any_order(self) -> None:
        """A document, lines or a trace, read after the place of each name is known."""
        places: dict[str, int] = {}
        for name in self._stream.items():
            if name in _DOCUMENT or name == "messages":
                places[name] = self._stream.tell()
            self._stream.skip()
        end = self._stream.tell()
        if "conversation" not in places:
            self._stream.seek(0)
            self._trace_alone()
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
        conversation = head["conversation"] or {}
        self._staging.begin(
            validation.read(validation.Conversation, conversation, "the conversation")
        )

    def _conversation(self, head: Json) -> None:
        """A document; the stream is at its messages."""
        self._begin(head)
        for _ in self._elements("the document", "messages"):
            where = f"message {self._staging.messages + 1}"
            self._read(where, _MESSAGE, ("trace",), self._message)

    def _message(self, values: Json, parts: Callable[[], Parts]) -> None:
        where = f"message {self._staging.messages + 1}"
        message = validation.read(validation.Message, values, where)

        def reply(trace: Json, lists: Callable[[], Parts]) -> None:
            self._reply(message, _read_trace(trace, f"{where}, trace"), lists, where)

        has_trace = False
        for _ in parts():
            has_trace = not self._is_null()
            if has_trace:
                self._read(f"{where}, trace", _TRACE, _STEPS, reply)
        if not has_trace:
            self._staging.add_message(message, where)

    # -------------------------------------------------------------------- a reply

    def _trace_alone(self) -> None:
        self._read("the trace", _TRACE, _STEPS, self._use_trace_alone)

    def _use_trace_alone(self, values: Json, lists: Callable[[], Parts]) -> None:
        """A trace outside a document: the messages before it, then its reply.

        It continues the conversation before it if it begins with all of its messages.
        """
        where = "the trace"
        if values.get("output") is None and values.get("prompt") is None:
            raise refused("it is not a trace: it has neither a prompt nor an output")
        trace = _read_trace(values, where)
        if self._in_order and not trace.get("capture"):
            # Its steps have to be surveyed first.
            raise _TraceOutOfOrder
        messages: list[validation.EarlierMessage] = list(trace.get("messages") or ())
        if not messages and trace.get("prompt"):
            messages = [{"role": Role.USER, "content": trace["prompt"] or ""}]
        history = [(message["role"], message["content"]) for message in messages]
        if not self._history or history[: len(self._history)] != self._history:
            users = (content for role, content in reversed(history) if role is Role.USER)
            self._staging.begin({"title": title_of(next(users, ""))})
            self._history = []
        for message in messages[len(self._history) :]:
            self._staging.add_message(_without_steps(message), f"{where}, messages")
        output = trace.get("output") or ""
        reply: validation.Message = {
            "role": Role.ASSISTANT,
            "content": output,
            "status": trace.get("status") or Status.COMPLETE,
            "reason": trace.get("reason"),
        }
        self._reply(reply, trace, lists, where)
        self._history = [*history, (Role.ASSISTANT, output)]

    def _reply(
        self,
        message: validation.Message,
        trace: validation.Trace,
        lists: Callable[[], Parts],
        where: str,
    ) -> None:
        """A reply with the ``lists`` of its steps."""
        survey = None if trace.get("capture") else self._survey(lists, where)
        ids = TokenIds(survey.chosen if survey else None)
        start = turn_start(trace, ids, survey, f"{where}, trace")
        first = survey.first if survey else 0
        message["checks"] = trace.get("checks")
        message["parts"] = trace.get("parts")
        message["template"] = trace.get("template") or message.get("template")
        number = message.get("id")
        values = self._lines.of(number, where) if self._lines else self._steps(lists, where)
        reader = StepReader(start, ids, first, where)

        def records() -> Iterator[Step]:
            for given, value in values:
                here = reader.name_of_next(given=given)
                step = reader.read(validation.read(validation.Step, value, here), given=given)
                tensors = self._tensors_of(number, step)
                yield replace(step, tensors=check_tensors(tensors, step, start.capture, here))

        has_tensors = self._tensors is not None and number is not None and self._tensors.has(number)
        self._staging.add_reply(message, start, records(), where, has_tensors=has_tensors)

    def _survey(self, lists: Callable[[], Parts], where: str) -> Survey:
        """All steps of version 1, before they are read."""
        if self._lines is not None or self._in_order:
            raise refused(f"{where}, trace: capture is missing")
        survey = Survey()
        for given, value in self._steps(lists, where):
            if not given:
                here = f"{where}, step {survey.steps}"
                survey.add(validation.read(validation.Step, value, here))
        self._surveyed += survey.steps
        self._check_length(self._surveyed)
        return survey

    def _steps(self, lists: Callable[[], Parts], where: str) -> Iterator[tuple[bool, Any]]:
        """(whether it is in the list of given ones, step)."""
        for name in lists():
            if not self._is_null():
                for _ in self._elements(where, name):
                    yield name == "prompt_steps", self._stream.value()

    def _tensors_of(self, message: int | None, step: Step) -> tuple[TensorRecord, ...]:
        if self._tensors is None or message is None:
            return ()
        given = step.origin == "given"
        place = StepPlace(step.position if given else step.step_index, given)
        tensors = tuple(self._tensors.of_step(message, place))
        self._tensor_count += len(tensors)
        return tensors

    # ------------------------------------------------------------------- objects

    def _read(self, where: str, names: set[str], parts: tuple[str, ...], use: Use) -> None:
        """Read the ``names`` of an object and ``use`` them before its long ``parts`` are read.

        Without ``parts``, those of a document or of a trace.
        """
        if self._stream.peek() != "{":
            raise refused(f"{where} is not an object")
        head: Json = {}
        places: dict[str, int] = {}
        items = self._stream.items()
        for name in items:
            of_file = ("messages",) if "conversation" in head else _STEPS
            if name in (parts or of_file):
                if not self._in_order:
                    places[name] = self._stream.tell()
                    self._stream.skip()
                elif not head.keys() >= _BEFORE[name]:
                    is_trace = not self._staging.began and name in _STEPS
                    raise _TraceOutOfOrder if is_trace else _OutOfOrder
                else:
                    self._use(use, head, self._rest(name, items, names, parts or of_file))
                    return
            elif name not in names:
                self._stream.skip()
            else:
                head[name] = self._stream.value()
        if self._in_order and parts != ("trace",):
            # The steps may be lines, which only the end of the document says.
            raise _OutOfOrder
        end = self._stream.tell()
        use(head, lambda: self._at(places))
        if places:
            self._stream.seek(end)

    def _use(self, use: Use, head: Json, rest: Parts) -> None:
        use(head, lambda: rest)
        for _ in rest:
            self._stream.skip()

    def _rest(
        self, first: str, items: Iterator[str], names: set[str], parts: tuple[str, ...]
    ) -> Parts:
        """The long part that the stream is at, and those after it. Raises _OutOfOrder."""
        seen = {first}
        yield first
        for name in items:
            if name in parts:
                seen.add(name)
                yield name
            elif name in names:
                raise _OutOfOrder
            else:
                self._stream.skip()
        if "steps" in parts and "steps" not in seen:
            # They may be lines, which only the end of the document says.
            raise _OutOfOrder

    def _at(self, places: dict[str, int]) -> Parts:
        for name, place in places.items():
            self._stream.seek(place)
            yield name

    def _elements(self, where: str, name: str) -> Iterator[None]:
        if self._stream.peek() != "[":
            raise refused(f"{where}: {name} is not a list")
        return self._stream.elements()

    def _is_null(self) -> bool:
        """Whether the next value is null, which means the same as no value."""
        return self._stream.peek() == "n" and self._stream.value() is None


class _Lines:
    """The steps of all replies, a line each, after the first line."""

    def __init__(self, stream: JsonStream, place: int) -> None:
        self._stream = stream
        self._place = place
        self._next: Any = None

    def of(self, number: int | None, where: str) -> Iterator[tuple[bool, Any]]:
        """(whether its token was given, step) of one reply.

        Afterwards the stream is where it was before.
        """
        if number is None:
            raise refused(f"{where}: id is missing")
        place = self._stream.tell()
        self._stream.seek(self._place)
        while self._next is not None or self._stream.peek():
            line = self._stream.value() if self._next is None else self._next
            self._next = line
            values = validation.read(validation.Line, line, "a line")
            if values["message"] != number:
                break
            self._next = None
            yield values.get("origin") == "given", line
        self._place = self._stream.tell()
        self._stream.seek(place)

    def end(self) -> None:
        """Raise unless every line belonged to a reply."""
        self._stream.seek(self._place)
        if self._next is not None or self._stream.peek():
            raise refused("a line belongs to no message, or is out of order")


def _read_trace(values: Json, where: str) -> validation.Trace:
    _check_version(values, where)
    return validation.read(validation.Trace, values, where)


def _check_version(values: Json, where: str) -> None:
    """Version 1 does not name itself; a version after ours is refused."""
    head = validation.read(validation.Document, values, where)
    if (head.get("format") or FORMAT) != FORMAT:
        raise refused(f"the format of {where} is not {FORMAT}")
    version = head.get("version") or 1
    if version > VERSION:
        raise refused(
            f"it has version {version}, but this oki-trace reads up to {VERSION}: upgrade oki-trace"
        )


def _without_steps(message: validation.EarlierMessage) -> validation.Message:
    """A message before a trace: its steps are not in the file, so its parts have none."""
    parts = [{**part, "start": None, "end": None} for part in message.get("parts") or ()]
    return {
        "role": message["role"],
        "content": message["content"],
        "parts": cast("list[validation.Part]", parts) or None,
        "tool_name": message.get("tool_name"),
    }
