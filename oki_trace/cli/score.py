"""``score``: scores a text with a model, token by token."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oki_trace.cli import options
from oki_trace.cli.output import console, print_json, print_text, progress_bar, table, token
from oki_trace.cli.session import load_model, reply_stream
from oki_trace.cli.watchdog import watchdog
from oki_trace.errors import UsageError
from oki_trace.input_text import read_text, require_storable
from oki_trace.records import Message, Status, StepSummary

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader


def score(
    text: Annotated[
        str | None, typer.Argument(help="The text; - reads it from standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from this file.")] = None,
    message: Annotated[
        int | None, typer.Option(help="Score this stored reply, after its own prompt.")
    ] = None,
    model: options.Model = None,
    window: Annotated[
        int | None, typer.Option(help="Score a long text in windows of this many tokens.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between window starts; default: half a window.")
    ] = None,
    four_bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    tensors: options.Tensors = "none",
    lens_layers: options.LensLayers = None,
    lens: options.Lenses = None,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Score a text with a model: logprob and rank of each token, perplexity, bits per byte.

    Nothing is generated. The text is stored as a message, with a step for each of its tokens.

    Each step has the model's distribution, the attention and the Logit Lens.

    Ctrl-C keeps the finished tokens; the exit status is 130.

    Example: oki-trace score "The capital of France is Paris."

    Example: oki-trace score --file notes.txt --window 2048 --stride 1024

    Example: oki-trace score --message 2 --model Qwen/Qwen2.5-0.5B-Instruct
    """
    sources = [text is not None, file is not None, message is not None]
    if sum(sources) != 1:
        raise UsageError("Give exactly one of a text, --file and --message.")
    content = None if message is not None else _content(text, file)
    policy = options.policy_of(tensors, lens_layers=lens_layers, lenses=lens)
    from oki_trace import scoring
    from oki_trace.llm.capture.teacher_forcing import Windows
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    windows = Windows.of(window, stride)
    store = options.store_of(db)
    with TraceWriter(store) as writer, TraceReader(store) as reader, watchdog() as dog:
        reply = None if message is None else _scorable(reader, message)
        loading = options.Turns(model=model, four_bit=four_bit, dtype=dtype, device=device)
        choice = loading.choice(None if reply is None else reply.choice)
        loaded = load_model(choice, lambda tokenizer: None)

        def given(instrument: Any) -> scoring.GivenText:
            own = instrument.tokenizer, instrument.vocabulary
            if reply is not None:
                return scoring.of_reply(*own, reader, reply)
            return scoring.of_text(*own, content or "")

        with reply_stream() as stream, progress_bar("scoring") as progress:
            scored = scoring.score_into_store(
                writer,
                loaded,
                choice,
                policy,
                given,
                of=message,
                windows=windows,
                should_stop=stream.should_stop,
                progress=progress,
                began=lambda number: setattr(
                    dog, "end_reply", partial(writer.end_abandoned, number, Status.STOPPED)
                ),
            )
        dog.end_reply = None
        dog.obeyed.set()
        _print(reader, scored, reply, as_json=json)
    raise typer.Exit(stream.exit_status or 0)


def _content(text: str | None, file: Path | None) -> str:
    if file is not None:
        content = read_text(file)
    else:
        content = sys.stdin.read() if text == "-" else text or ""
    if not require_storable(content, "The text"):
        raise UsageError("The text is empty. Give some text to score.")
    return content


def _scorable(reader: TraceReader, number: int) -> Message:
    reply = reader.message(number)
    if reply.tokens == 0 or reply.status.is_live:
        raise UsageError(
            f"Message {number} is not a finished reply with tokens. `oki-trace show` lists replies."
        )
    return reply


def _print(reader: TraceReader, number: int, reply: Message | None, *, as_json: bool) -> None:
    from oki_trace.likelihood import score_of
    from oki_trace.llm.capture.teacher_forcing import Windows

    message, steps = reader.message(number), reader.steps(number, given=True)
    own = {} if reply is None else _own_logprobs(reader, reply, steps)
    total = score_of(steps)
    lengths = None if message.capture is None else message.capture.windows
    context = (
        {}
        if lengths is None
        else {s.position: Windows(*lengths).context(s.position) for s in steps}
    )
    if as_json:
        print_json(
            {
                "conversation": message.conversation_id,
                "message": number,
                "score_of": message.score_of,
                "status": str(message.status),
                "model": message.model_id,
                "windows": lengths,
                "tokens": total.tokens,
                "bytes": total.bytes,
                "logprob": total.logprob,
                "perplexity": total.perplexity if math.isfinite(total.perplexity) else None,
                "bits_per_byte": total.bits_per_byte if total.bytes else None,
                "steps": [_step_object(step, own, context) for step in steps],
            },
            indent=None,
        )
        return
    more = [*(["in the reply"] if own else []), *(["context"] if context else [])]
    numbers = ("position", "logprob", "rank", "in the reply", "context")
    made = table("position", "token", "logprob", "rank", *more, right=numbers)
    for step in steps:
        cells = [f"{step.logprob:.3f}", f"{step.rank:,}"]
        if own:
            cells.append(f"{own[step.position]:.3f}" if step.position in own else "")
        if context:
            cells.append(f"{context[step.position]:,}")
        made.add_row(str(step.position), token(step.token), *cells)
    console().print(made)
    parts = [
        f"{message.status}" if message.status is not Status.COMPLETE else "",
        f"{total.tokens:,} tokens",
        f"logprob {total.logprob:.2f} nats",
        f"perplexity {total.perplexity:.2f}" if total.tokens else "",
        f"{total.bits_per_byte:.3f} bits per byte" if total.bytes else "",
        f"in the reply {sum(own.values()):.2f} nats" if own else "",
        f"conversation {message.conversation_id}, message {number}",
    ]
    print_text(" · ".join(part for part in parts if part), "dim")


def _own_logprobs(
    reader: TraceReader, reply: Message, steps: Sequence[StepSummary]
) -> dict[int, float]:
    """The reply's own logprob at each position; empty if the scored tokens are others."""
    own = {step.position: step for step in reader.steps(reply.id)}
    same = all(s.position in own and own[s.position].token_id == s.token_id for s in steps)
    return {at: step.logprob for at, step in own.items()} if same else {}


def _step_object(
    step: StepSummary, own: dict[int, float], context: dict[int, int]
) -> dict[str, Any]:
    """A scored token; ``context`` are the tokens that the model saw before it."""
    before = {"logprob_in_reply": own[step.position]} if step.position in own else {}
    return {
        "position": step.position,
        "token_id": step.token_id,
        "token": step.token,
        "logprob": step.logprob,
        "rank": step.rank,
        "is_special": step.is_special,
        "context": context.get(step.position, step.position),
        "full_context": context.get(step.position, step.position) == step.position,
        **before,
    }
