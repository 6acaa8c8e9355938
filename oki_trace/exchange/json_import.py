"""Conversations and traces from JSON: a document, lines, a trace, or a list of traces.

A document of this project's making is read with one step in memory. One whose
names stand in another order, and traces of version 1, are held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from oki_trace.asking import title_of
from oki_trace.exchange import incoming
from oki_trace.exchange.fields import Fields, wrong
from oki_trace.exchange.json_export import JSONL
from oki_trace.exchange.json_stream import JsonStream
from oki_trace.exchange.staging import Staging
from oki_trace.exchange.tensor_file import TensorFile
from oki_trace.exchange.trace_object import FORMAT, VERSION
from oki_trace.records import Step

Json = dict[str, Any]

# What the head of a trace needs before its steps can be read as they come.
_BEFORE_STEPS = {"prompt", "prompt_tokens", "generation", "capture"}
_BEFORE_TRACE = {"id", "role", "content", "status"}


class JsonImport:
    """One file into ``staging``; ``tensors`` stand beside it."""

    def __init__(
        self,
        stream: JsonStream,
        staging: Staging,
        tensors: TensorFile | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._stream = stream
        self._staging = staging
        self._tensors = tensors
        self._tick = tick
        self._tensors_seen = 0
        # What the conversation under way has said, for a trace that goes on with it.
        self._said: list[tuple[str, str]] = []

    def run(self) -> None:
        """Read it all. Raises ExchangeError."""
        if self._stream.peek() == "[":
            for _ in self._stream.elements():
                self._alone(self._stream.value())
        elif self._stream.peek() == "{":
            self._document()
        else:
            raise self._stream.wrong("it is not JSON of oki-trace")
        self._stream.end()
        if self._tensors and self._tensors_seen != len(self._tensors):
            raise wrong("the file of tensors has some that belong to no step")

    # ------------------------------------------------------------- a conversation

    def _document(self) -> None:
        head: Json = {}
        messages_read = False
        for name in self._stream.items():
            if name == "messages" and "conversation" in head and head.get("layout") != JSONL:
                self._begin(head)
                for _ in self._stream.elements():
                    self._message()
                messages_read = True
            elif name == "steps" and head.keys() >= _BEFORE_STEPS:
                self._alone(head, (self._stream.value() for _ in self._stream.elements()))
                messages_read = True
            else:
                head[name] = self._stream.value()
        if messages_read:
            return
        if head.get("layout") == JSONL:
            self._lines(head)
        elif "conversation" in head:
            self._begin(head)
            for message in Fields(head, "the document").list("messages", incoming.MAX_MESSAGES):
                self._whole_message(message)
        else:
            self._alone(head)

    def _begin(self, head: Json) -> None:
        fields = Fields(head, "the document")
        _check_version(fields)
        self._staging.begin(fields.object("conversation"))

    def _message(self) -> None:
        """One message of a document, its steps as they come where the names allow it."""
        head: Json = {}
        done = False
        for name in self._stream.items():
            if name == "trace" and head.keys() >= _BEFORE_TRACE:
                self._trace(head)
                done = True
            else:
                head[name] = self._stream.value()
        if not done:
            self._whole_message(head)

    def _trace(self, message: Json) -> None:
        if self._stream.peek() != "{":
            self._whole_message({**message, "trace": self._stream.value()})
            return
        head: Json = {}
        done = False
        for name in self._stream.items():
            if name == "steps" and head.keys() >= _BEFORE_STEPS:
                steps = (self._stream.value() for _ in self._stream.elements())
                self._reply(message, head, steps)
                done = True
            else:
                head[name] = self._stream.value()
        if not done:
            self._whole_message({**message, "trace": head})

    def _whole_message(self, message: Any) -> None:
        fields = Fields(message, f"message {self._staging.messages + 1}")
        trace = fields.object("trace")
        if trace is None:
            self._staging.say(fields)
        else:
            steps = trace.list("steps", incoming.MAX_STEPS, [])
            self._reply(message, fields.raw("trace"), steps)

    def _lines(self, head: Json) -> None:
        self._begin(head)
        waiting: list[Json] = []

        def steps_of(number: int | None) -> Iterator[Any]:
            while waiting or self._stream.peek():
                line = waiting.pop() if waiting else self._stream.value()
                if Fields(line, "a line").integer("message", high=2**63) != number:
                    waiting.append(line)
                    return
                yield line

        for message in Fields(head, "the first line").list("messages", incoming.MAX_MESSAGES):
            fields = Fields(message, f"message {self._staging.messages + 1}")
            if "trace" in fields:
                number = fields.integer("id", high=2**63)
                self._reply(message, fields.raw("trace"), steps_of(number))
            else:
                self._staging.say(fields)
        if waiting:
            raise wrong("a line is of no message, or out of order")

    def _reply(self, message: Json, trace: Any, steps: Iterable[Any]) -> None:
        """A reply of a document. ``steps`` is read once, from its start to its end."""
        fields = Fields(message, f"message {self._staging.messages + 1}")
        head = Fields(trace, f"{fields.where}, trace")
        _check_version(head)
        if "capture" not in head:
            steps = list(steps)
        known = steps if isinstance(steps, list) else []
        ids = incoming.TokenIds(incoming.chosen_tokens(known))
        start = incoming.turn_start(head, ids, known)
        number = fields.integer("id", None, high=2**63)

        def records() -> Iterator[Step]:
            first = _first(known)
            for index, step in enumerate(steps):
                read = Fields(step, f"{fields.where}, step {index}")
                yield self._with_tensors(incoming.step(read, index, start, ids, first), number)
                self._tick()

        self._staging.reply(fields, start, records(), fields.integer("tokens", None))

    def _with_tensors(self, step: Step, message: int | None) -> Step:
        if self._tensors is None or message is None:
            return step
        tensors = tuple(self._tensors.of_step(message, step.step_index))
        self._tensors_seen += len(tensors)
        return replace(step, tensors=tensors) if tensors else step

    # ------------------------------------------------------------------ one trace

    def _alone(self, trace: Any, steps: Iterator[Any] | None = None) -> None:
        """A trace by itself: what was said before it, then its reply.

        It goes on with the conversation before it where it begins with all of that.
        """
        fields = Fields(trace, "the trace")
        if "output" not in fields and "prompt" not in fields:
            raise wrong("it is no trace: it has neither a prompt nor an output")
        _check_version(fields)
        said = [
            (message.text("role"), message.text("content"))
            for message in fields.objects("messages", incoming.MAX_MESSAGES)
        ]
        if not said and fields.text("prompt", ""):
            said = [("user", fields.text("prompt"))]
        if not self._said or said[: len(self._said)] != self._said:
            last = next((content for role, content in reversed(said) if role == "user"), "")
            self._staging.begin(None, title_of(last))
            self._said = []
        for role, content in said[len(self._said) :]:
            self._staging.say(Fields({"role": role, "content": content}, "the trace, messages"))
        output = fields.text("output", "")
        reply = {
            "role": "assistant",
            "content": output,
            "status": fields.text("status", "complete"),
            "reason": fields.text("reason", None),
        }
        whole = fields.list("steps", incoming.MAX_STEPS, []) if steps is None else steps
        self._reply(reply, trace, whole)
        self._said = [*said, ("assistant", output)]


def _first(steps: list[Any]) -> int:
    """What the first step calls itself: some trace writers count from 1."""
    return 1 if steps and Fields(steps[0], "step 0").raw("step") == 1 else 0


def _check_version(fields: Fields) -> None:
    """Version 1 says nothing of itself; a later one than ours is refused."""
    if fields.text("format", FORMAT) != FORMAT:
        raise wrong(f"{fields.where} is of another format")
    version = fields.integer("version", 1)
    if version > VERSION:
        raise wrong(f"it is of version {version}, this program knows {VERSION}: upgrade oki-trace")
