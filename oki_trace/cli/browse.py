"""``list`` and ``show``: what the store holds, readable in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import console, inert, print_error, print_json, table, token
from oki_trace.errors import NotFound, StoreError
from oki_trace.exchange.decision import (
    call_line,
    effects_table,
    explain,
    explain_generation,
    quoted,
)
from oki_trace.records import Conversation, Lens, Message, Prompt, Role, Step

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader

BAR_WIDTH = 24


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command("list")(list_conversations)
    app.command()(show)


def list_conversations(
    search: Annotated[
        str | None, typer.Option("--search", "-s", help="Only those with this text.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many.")] = 50,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """The conversations in the store, the latest first.

    Example: oki-trace list --search Paris

    Example: oki-trace list --json
    """
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        found = reader.conversations(search=search, limit=limit)
    if json:
        print_json([_conversation_json(c) for c in found])
        return
    if not found:
        console().print("No conversations. Begin one with: oki-trace demo")
        return
    rows = table("id", "when", "title", "model", "messages", "tokens", "status", right=("id",))
    for c in found:
        rows.add_row(
            str(c.id),
            f"{c.updated_at.astimezone():%Y-%m-%d %H:%M}",
            Text(inert(c.title, keep="")),
            Text(inert(", ".join(c.model_ids), keep="")),
            str(c.messages),
            f"{c.tokens:,}",
            Text("damaged", "red") if c.damage else str(c.status),
        )
    for c in found:
        if c.damage:
            print_error(f"conversation {c.id} is damaged: {c.damage} (see oki-trace verify {c.id})")
    console().print(rows)


def show(
    conversation: Annotated[int, typer.Argument(help="Its number, as in: oki-trace list")],
    message: Annotated[int | None, typer.Option("--message", help="Only this message.")] = None,
    step: Annotated[
        int | None, typer.Option("--step", help="One step of the reply, in full.")
    ] = None,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """A conversation, with every step of its replies.

    Example: oki-trace show 1 --step 5

    Example: oki-trace show 1 --message 2 --json
    """
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        messages = reader.messages(conversation)
        chosen = [m for m in messages if message in (None, m.id)]
        if not chosen:
            raise NotFound(
                f"Conversation {conversation} has no message {message}. "
                f"See: oki-trace show {conversation}"
            )
        if step is not None:
            _show_step(reader, _reply_among(chosen, conversation), step, json)
        elif json:
            _show_json(reader, conversation, message)
        else:
            _show_messages(reader, chosen)


def _reply_among(messages: list[Message], conversation: int) -> Message:
    replies = [m for m in messages if m.role is Role.ASSISTANT]
    if not replies:
        raise NotFound(f"Conversation {conversation} has no reply there. Leave out --message.")
    return replies[-1]


def _show_json(reader: TraceReader, conversation: int, message: int | None) -> None:
    from oki_trace.exchange.json_export import conversation_object

    document = conversation_object(reader, conversation)
    kept = [m for m in document["messages"] if message in (None, m["id"])]
    print_json({**document, "messages": kept})


def _show_messages(reader: TraceReader, messages: list[Message]) -> None:
    out = console()
    for message in messages:
        out.print()
        who = f"{message.role} {inert(message.tool_name or '', keep='')}".rstrip()
        out.print(Text(f"{who} · message {message.id}", style="bold"))
        for text, style in _said(message):
            # Written as it is: wrapping would put line ends into it.
            out.print(Text(inert(text), style=style), soft_wrap=True)
        if message.damage is not None and message.role is not Role.ASSISTANT:
            out.print(Text(inert(message.reason or ""), style="red"))
        if message.role is Role.ASSISTANT:
            out.print(Text(_headline(message), style="dim"))
            if message.capture is not None and message.capture.speedups:
                out.print(Text(inert(message.capture.fast_paths), style="dim"))
            try:
                _print_steps(out, list(reader.iter_steps(message.id)))
            except StoreError as error:
                out.print(Text(inert(str(error)), style="red"), soft_wrap=True)


def _said(message: Message) -> list[tuple[str, str]]:
    """The text of each part of a message, with its style: thinking is dim."""
    if all(part.kind == "answer" for part in message.parts):
        return [(message.content, "")] if message.content else []
    said = []
    for part in message.parts:
        if part.kind == "tool_call":
            said.append((f"tool call: {call_line(part)}", "cyan"))
        elif part.text:
            said.append((part.text, "dim" if part.kind == "thinking" else ""))
    return said


def _headline(message: Message) -> str:
    parts = [str(message.status) + (f" ({inert(message.reason)})" if message.reason else "")]
    parts.append(f"{message.tokens} tokens")
    if message.seconds:
        parts.append(f"{message.tokens / message.seconds:.1f} tokens/s")
    parts.append(inert(message.model_id or ""))
    if message.generation is not None:
        parts.append(inert(explain_generation(message.generation)))
    capture = message.capture
    if capture is not None:
        parts.append(f"{capture.dtype} on {capture.device}")
        lens_check = message.lens_check
        if capture.logit_lens_available and lens_check is not None:
            parts.append(f"lens check {lens_check:.0e}")
        elif capture.lens_reason:
            parts.append(f"lens not available: {inert(capture.lens_reason)}")
        if message.tensors_pruned_at is not None:
            parts.append(f"tensors pruned on {message.tensors_pruned_at:%Y-%m-%d}")
        elif capture.tensors_left_out:
            parts.append("tensors left out of the export")
        if not capture.attention_layers:
            parts.append(f"evidence {inert(capture.evidence_provenance)}")
    if message.checks is not None:
        parts += [f"CHECK FAILED: {inert(message.checks.fault)}"] if message.checks.fault else []
        parts += [inert(note) for note in message.checks.notes]
    return " · ".join(part for part in parts if part)


def _print_steps(out: Console, steps: list[Step]) -> None:
    columns = ("step", "token", "prob", "", "runner-up", "prob ", "entropy", "settled")
    rows = table(*columns, right=("step", "prob", "prob ", "entropy", "settled"))
    for step in steps:
        other = _runner_up(step)
        rows.add_row(
            str(step.step_index),
            token(step.token),
            f"{step.prob:.3f}",
            _bar(step.prob, BAR_WIDTH // 2),
            token(other[0]) if other else "",
            f"{other[1]:.3f}" if other else "",
            f"{step.entropy:z.2f}",
            _settled(step.lens),
        )
    out.print(rows)


def _runner_up(step: Step) -> tuple[str, float] | None:
    """The most likely token that was not chosen."""
    top = step.topk
    for token_id, text, prob in zip(
        top.token_ids.tolist(), top.tokens, top.probs.tolist(), strict=True
    ):
        if token_id != step.token_id:
            return text, prob
    return None


def _settled(lens: Lens | None) -> str:
    if lens is None:
        return "–"
    layer = lens.settle_layer
    return "never" if layer is None else f"layer {layer}"


def _bar(share: float, width: int) -> Text:
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    bar = "█" * (eighths // 8) + (chr(0x2590 - eighths % 8) if eighths % 8 else "")
    return Text(bar, style="cyan")


def _show_step(reader: TraceReader, message: Message, index: int, as_json: bool) -> None:
    step = reader.step(message.id, index)
    if as_json:
        _show_step_json(reader, message, step)
        return
    out = console()
    prompt = reader.prompt(message.id)
    out.print(Text("step ").append(str(index), "bold").append("  "), token(step.token), end="")
    out.print(
        f"   prob {step.prob:.4f} · rank {step.rank} · surprisal {step.surprisal:z.3f} nats"
        f" · entropy {step.entropy:z.3f} nats · position {step.position}"
        f" · settled {_settled(step.lens)}"
    )
    _print_decision(out, step)
    _print_candidates(out, step)
    _print_evidence(out, reader, message, step, prompt)
    _print_lens(out, message, step)


def _show_step_json(reader: TraceReader, message: Message, step: Step) -> None:
    from oki_trace.exchange.json_export import trace_of

    trace = trace_of(reader, reader.messages(message.conversation_id), message, timed=True)
    print_json(next(s for s in (trace or {})["steps"] if s["step"] == step.step_index))


def _print_decision(out: Console, step: Step) -> None:
    def quote(text: str) -> str:
        return quoted(token(text).plain)

    out.print(Text(explain(step, quote)), soft_wrap=True)
    effects = effects_table(step)
    if effects:
        columns = ("setting", "removed", "that had", "the token then")
        rows = table(*columns, right=columns[1:])
        for name, *figures in effects:
            rows.add_row(Text(inert(name)), *figures)
        out.print()
        out.print(rows)


def _print_candidates(out: Console, step: Step) -> None:
    top = step.topk
    after: list[tuple[str, list[str]]] = []
    if top.sampled_probs is not None:
        after.append(("sampled", [f"{prob:.4f}" for prob in top.sampled_probs.tolist()]))
    if top.noise is not None and top.sampled_probs is not None:
        # What was removed took no part in the draw.
        pairs = zip(top.noise.tolist(), top.sampled_probs.tolist(), strict=True)
        after.append(("noise", [f"{noise:+z.2f}" if prob else "" for noise, prob in pairs]))
    names = [name for name, _ in after]
    rows = table("considered", "prob", "", *names, right=tuple(names))
    for rank, (text, prob) in enumerate(zip(top.tokens, top.probs.tolist(), strict=True)):
        cells = [column[rank] for _, column in after]
        rows.add_row(token(text), f"{prob:.4f}", _bar(prob, BAR_WIDTH), *cells)
    out.print()
    out.print(rows)


def _print_evidence(
    out: Console, reader: TraceReader, message: Message, step: Step, prompt: Prompt
) -> None:
    out.print()
    if step.evidence is None:
        why = message.capture.evidence_provenance if message.capture else "not available"
        out.print(Text(f"evidence: {inert(why)}", style="dim"))
        return
    tokens = [*prompt.tokens, *(s.token for s in reader.steps(message.id))]
    rows = table("evidence", "position", "weight", "", right=("position", "weight"))
    pairs = zip(step.evidence.positions.tolist(), step.evidence.weights.tolist(), strict=True)
    for position, weight in pairs:
        rows.add_row(
            token(tokens[position]), str(position), f"{weight:.4f}", _bar(weight, BAR_WIDTH)
        )
    out.print(rows)
    if message.capture is not None:
        _print_check(out, "attention check", message.capture.attention_check)


def _print_lens(out: Console, message: Message, step: Step) -> None:
    out.print()
    lens = step.lens
    if lens is None:
        why = (message.capture and message.capture.lens_reason) or "not computed yet"
        out.print(Text(f"logit lens: {inert(why)}", style="dim"))
        return
    width = min(3, lens.token_ids.shape[1])
    rows = table("layer", *["", "prob"] * width, "chosen ranks", right=("layer", "chosen ranks"))
    for layer in range(len(lens.tokens) - 1, -1, -1):
        cells: list[Any] = []
        for k in range(width):
            cells += [token(lens.tokens[layer][k]), f"{float(lens.probs[layer, k]):.3f}"]
        rows.add_row(str(layer), *cells, f"{int(lens.chosen_rank[layer]):,}")
    out.print(rows)
    if message.capture is not None:
        _print_check(out, "lens check", message.lens_check)
        _print_check(out, "lens draft", message.capture.lens_draft)


def _print_check(out: Console, name: str, error: float | None) -> None:
    """How far it was from the model itself when the model was loaded."""
    if error is not None:
        out.print(Text(f"{name} {error:.0e}", style="dim"))


def _conversation_json(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "title": conversation.title,
        "created_at": conversation.created_at.isoformat(),
        "updated_at": conversation.updated_at.isoformat(),
        "messages": conversation.messages,
        "tokens": conversation.tokens,
        "status": str(conversation.status),
        "model_ids": list(conversation.model_ids),
        **({"damage": conversation.damage} if conversation.damage else {}),
    }
