"""``list`` and ``show``: print conversations, replies and steps."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import (
    bar,
    cell,
    console,
    print_error,
    print_json,
    print_text,
    table,
    token,
)
from oki_trace.cli.tree import print_tree
from oki_trace.errors import NotFound, StoreError, UsageError
from oki_trace.explain import (
    call_line,
    effects_table,
    explain,
    explain_generation,
    quoted,
)
from oki_trace.records import LOGIT, Conversation, Lens, Message, Prompt, Role, Step

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader

BAR_WIDTH = 24
# Of a message that has only given tokens.
GIVEN_LINES = 40


def list_(
    search: Annotated[
        str | None,
        typer.Option("--search", "-s", help="Only conversations that contain this text."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="Maximum number of rows.")
    ] = 50,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """List the conversations in the store, the latest first.

    Example: oki-trace list --search Paris

    Example: oki-trace list --json
    """
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        conversations = reader.conversations(search=search, limit=limit)
        scored = {c.id: reader.scored_tokens(c) for c in conversations}
    if json:
        print_json([_conversation_json(c, scored[c.id]) for c in conversations])
        return
    if not conversations:
        print_text("No conversations. Begin one with: oki-trace demo")
        return
    rows = table("id", "when", "title", "model", "messages", "tokens", "status", right=("id",))
    for c in conversations:
        rows.add_row(
            str(c.id),
            f"{c.updated_at.astimezone():%Y-%m-%d %H:%M}",
            cell(c.title),
            cell(", ".join(c.model_ids)),
            str(c.messages),
            f"{scored[c.id]:,} scored" if scored[c.id] else f"{c.tokens:,}",
            Text("damaged", "red") if c.damage else str(c.status),
        )
        if c.damage:
            print_error(f"conversation {c.id} is damaged: {c.damage} (see oki-trace verify {c.id})")
    console().print(rows)


def show(
    conversation: options.Number,
    message: options.MessageId = None,
    step: Annotated[int | None, typer.Option(help="Show this step in detail.")] = None,
    position: Annotated[
        int | None,
        typer.Option(help="Show the step of the token at this position, also in the prompt."),
    ] = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="Show which branches there are, and how likely each is.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Show a conversation and every step of its replies.

    Example: oki-trace show 1 --step 5

    Example: oki-trace show 1 --message 2 --position 12

    Example: oki-trace show 1 --message 2 --json

    Example: oki-trace show 1 --tree
    """
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        messages = [m for m in reader.messages(conversation) if message in (None, m.id)]
        if not messages:
            raise NotFound(
                f"Conversation {conversation} has no message {message}. "
                f"See: oki-trace show {conversation}"
            )
        if tree and not json:
            print_tree(reader, messages)
            return
        if step is not None and position is not None:
            raise UsageError("Give either --step or --position, not both.")
        if step is not None or position is not None:
            replies = [m for m in messages if m.role is Role.ASSISTANT]
            if not replies:
                raise NotFound(
                    f"Conversation {conversation} has no reply there. Leave out --message."
                )
            place = (replies[-1], step, False) if step is not None else None
            place = place or _at_position(reader, replies[-1], position or 0)
            (_print_step_json if json else _print_step)(reader, *place)
        elif json:
            _print_conversation_json(reader, conversation, message)
        else:
            for one in messages:
                _print_message(reader, one)


def _at_position(reader: TraceReader, message: Message, position: int) -> tuple[Message, int, bool]:
    """The step whose token is at a position: (its message, its index, whether it is given).

    An earlier turn may have traced the beginning of the prompt.
    """
    prompt_len = message.prompt_len or 0
    if position >= prompt_len:
        return message, position - prompt_len, False
    found = reader.prompt_steps(message.id).get(position)
    if found is None:
        return message, position, True
    generated = found.step.step_index >= 0
    index = found.step.step_index if generated else position
    return reader.message(found.message_id), index, not generated


def _conversation_json(conversation: Conversation, scored: int) -> dict[str, Any]:
    """``scored``: the tokens of a scored text, left out where there is none."""
    values = asdict(conversation) | ({"scored": scored} if scored else {})
    for name in ("created_at", "updated_at"):
        values[name] = values[name].isoformat()
    return {name: value for name, value in values.items() if name != "damage" or value}


def _print_conversation_json(reader: TraceReader, conversation: int, message: int | None) -> None:
    from oki_trace.exchange.json_export import conversation_object

    document = conversation_object(reader, conversation)
    messages = [m for m in document["messages"] if message in (None, m["id"])]
    print_json({**document, "messages": messages})


def _print_message(reader: TraceReader, message: Message) -> None:
    print_text()
    print_text(
        f"{message.role} {message.tool_name or ''}".rstrip() + f" · message {message.id}", "bold"
    )
    for text, style in _texts(message):
        print_text(text, style, keep="\n\t")
    if message.role is not Role.ASSISTANT:
        if message.damage is not None:
            print_text(message.reason or "", "red")
        return
    if message.branch_of is not None:
        print_text(f"branch of message {message.branch_of} at step {message.branch_step}", "dim")
    given = 0 if message.tokens else reader.given_count(message.id)
    print_text(_headline(message, given), "dim")
    if message.capture is not None and message.capture.speedups:
        print_text(message.capture.fast_paths, "dim")
    try:
        if message.tokens:
            _print_steps(list(reader.iter_steps(message.id)))
        else:
            _print_given(reader, message, given)
    except StoreError as error:
        print_text(str(error), "red")


def _texts(message: Message) -> list[tuple[str, str]]:
    """(text, style) of each part of a message; thinking is dim."""
    if all(part.kind == "answer" for part in message.parts):
        return [(message.content, "")] if message.content else []
    styles = {"thinking": "dim", "tool_call": "cyan"}
    return [
        (
            f"tool call: {call_line(part)}" if part.kind == "tool_call" else part.text,
            styles.get(part.kind, ""),
        )
        for part in message.parts
        if part.text or part.kind == "tool_call"
    ]


def _headline(message: Message, given: int) -> str:
    """``given``: the number of given tokens of a message that generated none."""
    parts = [
        str(message.status) + (f" ({message.reason})" if message.reason else ""),
        f"{given:,} given tokens" if given else f"{message.tokens} tokens",
        f"{(given or message.tokens) / message.seconds:.1f} tokens/s" if message.seconds else "",
        message.model_id or "",
        explain_generation(message.generation) if message.generation is not None else "",
    ]
    capture = message.capture
    if capture is not None:
        parts.append(f"{capture.dtype} on {capture.device}")
        if capture.reused:
            parts.append(f"{capture.reused:,} prompt tokens from the KV cache of the last reply")
        elif capture.not_reused:
            parts.append(f"the whole prompt ran again: {capture.not_reused}")
        if capture.logit_lens_available and message.lens_check is not None:
            parts.append(f"lens check {message.lens_check:.0e}")
        elif capture.lens_reason:
            parts.append(f"lens not available: {capture.lens_reason}")
        if message.tensors_pruned_at is not None:
            parts.append(f"tensors pruned on {message.tensors_pruned_at:%Y-%m-%d}")
        elif capture.tensors_left_out:
            parts.append("tensors left out of the export")
        if not capture.attention_layers:
            parts.append(f"evidence {capture.evidence_provenance}")
    if message.checks is not None:
        parts.append(f"CHECK FAILED: {message.checks.fault}" if message.checks.fault else "")
        parts += message.checks.notes
    return " · ".join(part for part in parts if part)


def _print_given(reader: TraceReader, message: Message, count: int) -> None:
    """The first given tokens of a message that generated none, such as a scored text."""
    steps = list(islice(reader.iter_steps(message.id, given=True), GIVEN_LINES))
    if not steps:
        return
    _print_steps(steps, "position")
    more = count - len(steps)
    if more > 0:
        show_one = f"oki-trace show {message.conversation_id} --message {message.id}"
        print_text(
            f"{more:,} more tokens: {show_one} --position P shows one, --json shows all.", "dim"
        )


def _print_steps(steps: list[Step], index: str = "step") -> None:
    """``index``: the heading of the step_index, or of the position of given tokens."""
    columns = (index, "token", "prob", "", "runner-up", "prob ", "entropy", "settled")
    rows = table(*columns, right=(index, "prob", "prob ", "entropy", "settled"))
    for step in steps:
        other = _runner_up(step)
        rows.add_row(
            str(step.position if step.origin == "given" else step.step_index),
            token(step.token),
            f"{step.prob:.3f}",
            bar(step.prob, BAR_WIDTH // 2),
            token(other[0]) if other else "",
            f"{other[1]:.3f}" if other else "",
            f"{step.entropy:z.2f}",
            _settled(step.lens),
        )
    console().print(rows)


def _runner_up(step: Step) -> tuple[str, float] | None:
    """(text, prob) of the most likely token that was not chosen."""
    top = step.topk
    candidates = zip(top.token_ids.tolist(), top.tokens, top.probs.tolist(), strict=True)
    return next(((text, prob) for id, text, prob in candidates if id != step.token_id), None)


def _settled(lens: Lens | None) -> str:
    if lens is None:
        return "–"
    return "never" if lens.settle_layer is None else f"layer {lens.settle_layer}"


def _print_step(reader: TraceReader, message: Message, index: int, given: bool) -> None:
    step = reader.step(message.id, index, given=given)
    prompt = reader.prompt(message.id)
    name = "given token at position " if given else "step "
    console().print(Text(name).append(str(index), "bold").append("  "), token(step.token), end="")
    print_text(
        f"   prob {step.prob:.4f} · rank {step.rank} · surprisal {step.surprisal:z.3f} nats"
        f" · entropy {step.entropy:z.3f} nats · position {step.position}"
        f" · settled {_settled(step.lens)}"
    )
    if not given:
        _print_decision(step)
    _print_candidates(step)
    _print_evidence(reader, message, step, prompt)
    _print_lens(message, step)


def _print_step_json(reader: TraceReader, message: Message, index: int, given: bool) -> None:
    from oki_trace.exchange.json_export import trace_of

    step = reader.step(message.id, index, given=given)
    trace = trace_of(reader, reader.messages(message.conversation_id), message, timed=True)
    steps = (trace or {})["prompt_steps" if given else "steps"]
    print_json(next(s for s in steps if s["position"] == step.position))


def _print_decision(step: Step) -> None:
    print_text(explain(step, lambda text: quoted(token(text).plain)))
    effects = effects_table(step)
    if effects:
        columns = ("setting", "removed", "removed prob", "chosen prob")
        rows = table(*columns, right=columns[1:])
        for name, *figures in effects:
            rows.add_row(cell(name), *figures)
        print_text()
        console().print(rows)


def _print_candidates(step: Step) -> None:
    top = step.topk
    columns: dict[str, list[str]] = {}
    if top.sampled_probs is not None:
        sampled = top.sampled_probs.tolist()
        columns["sampled"] = [f"{prob:.4f}" for prob in sampled]
        if top.noise is not None:
            # A removed token took no part in the draw.
            pairs = zip(top.noise.tolist(), sampled, strict=True)
            columns["noise"] = [f"{noise:+z.2f}" if prob else "" for noise, prob in pairs]
    rows = table("candidate", "prob", "", *columns, right=tuple(columns))
    for rank, (text, prob) in enumerate(zip(top.tokens, top.probs.tolist(), strict=True)):
        cells = [column[rank] for column in columns.values()]
        rows.add_row(token(text), f"{prob:.4f}", bar(prob, BAR_WIDTH), *cells)
    if top.tokens and step.rank > len(top.tokens):
        # The chosen token is always there.
        name = token(step.token).append(f"  rank {step.rank:,}", "dim")
        drawn = [f"{step.sampled_prob:.4f}"] if columns and step.sampled_prob is not None else []
        cells = [*drawn, *[""] * (len(columns) - len(drawn))]
        rows.add_row(name, f"{step.prob:.4f}", bar(step.prob, BAR_WIDTH), *cells)
    print_text()
    console().print(rows)


def _print_evidence(reader: TraceReader, message: Message, step: Step, prompt: Prompt) -> None:
    print_text()
    if step.evidence is None:
        reason = message.capture.evidence_provenance if message.capture else "not available"
        print_text(f"evidence: {reason}", "dim")
        return
    tokens = [*prompt.tokens, *(s.token for s in reader.steps(message.id))]
    rows = table("evidence", "position", "weight", "", right=("position", "weight"))
    pairs = zip(step.evidence.positions.tolist(), step.evidence.weights.tolist(), strict=True)
    for position, weight in pairs:
        weight_bar = bar(weight, BAR_WIDTH)
        rows.add_row(token(tokens[position]), str(position), f"{weight:.4f}", weight_bar)
    console().print(rows)
    if message.capture is not None:
        _print_check("attention check", message.capture.attention_check)


def _print_lens(message: Message, step: Step) -> None:
    print_text()
    lens = step.lens
    if lens is None:
        reason = (message.capture and message.capture.lens_reason) or "not computed yet"
        print_text(f"logit lens: {reason}", "dim")
        return
    for one in (lens, *step.lenses):
        if step.lenses:
            print_text("Logit Lens" if one.name == LOGIT else f"lens {one.name}", "bold")
        _print_layers(one)
    if message.capture is not None:
        _print_check("lens check", message.lens_check)
        _print_check("lens draft", message.capture.lens_draft)


def _print_layers(lens: Lens) -> None:
    width = min(3, lens.token_ids.shape[1])
    rows = table("layer", *["", "prob"] * width, "chosen rank", right=("layer", "chosen rank"))
    for row, layer in reversed(list(enumerate(lens.layer_numbers.tolist()))):
        cells: list[Any] = []
        for k in range(width):
            cells += [token(lens.tokens[row][k]), f"{float(lens.probs[row, k]):.3f}"]
        rows.add_row(str(layer), *cells, f"{int(lens.chosen_rank[row]):,}")
    console().print(rows)


def _print_check(name: str, error: float | None) -> None:
    """The largest difference from the model itself."""
    if error is not None:
        print_text(f"{name} {error:.0e}", "dim")
