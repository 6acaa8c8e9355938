"""The data of a reply's tokens and of one step's numbers: pure functions.

A token shown alone has its spaces and line ends made visible; within running
text it appears as it is.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from dashboard.viewdata.wording import (
    Column,
    Json,
    finite,
    format_number,
    mark_line_ends,
    shorten,
    table_data,
)
from oki_trace.explain import effects_table, explain, explain_generation, quoted
from oki_trace.records import (
    CapturePolicy,
    CaptureReport,
    Generation,
    Message,
    Part,
    PartKind,
    Prompt,
    Sampling,
    Status,
    Step,
    StepSummary,
)
from oki_trace.reporting import counted
from oki_trace.sanitize import visible

Colour = Literal["surprisal", "entropy", "margin", "settle layer"]
COLOURS: tuple[Colour, ...] = get_args(Colour)

MEANINGS = {
    "prob": "The model's own probability, before any sampling setting",
    "sampled": "Its probability after temperature, truncation and penalties",
    "rank": "Among all tokens of the vocabulary; 1 is the most likely",
    "surprisal": "-log prob of the chosen token, in nats",
    "entropy": "Of the whole next-token distribution, in nats: 0 when the model is certain",
    "margin": "Probability of the likeliest token minus that of the second",
    "settled": "The first layer from which the chosen token stays on top",
}


def token_texts(steps: Sequence[StepSummary]) -> list[str]:
    """Each token's share of the reply's text; a split character goes to the token that ends it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(step.token_bytes) for step in steps]


def token_data(step: StepSummary, text: str) -> Json:
    """A token within running text, ``text`` being its share; marked if it is not a word."""
    return {
        "text": visible(step.token) if step.is_special else (mark_line_ends(text) or "◌"),
        "mark": step.is_special or not text.strip("\n"),
    }


def reply_data(
    steps: Sequence[StepSummary],
    *,
    conversation: int,
    message: int,
    colour: Colour,
    layers: int,
    live: bool,
    status: str,
    bad: bool,
    parts: Sequence[Part] = (),
    shared: Sequence[StepSummary] = (),
) -> Json:
    """The data of ``components/reply.js``; ``shared`` are the steps of a branch's beginning."""
    kinds = part_kinds(parts, len(steps))
    own = steps
    steps = [*shared, *own]
    values, low, high = shades(steps, colour, layers)
    tokens = [
        {
            **token_data(step, text),
            "value": None if value is None else round(value, 3),
            "title": token_tooltip(step),
            **({} if kind == "answer" else {"part": kind}),
        }
        for step, text, value, kind in zip(
            steps, token_texts(steps), values, ["shared"] * len(shared) + [*kinds], strict=True
        )
    ]
    thinking = kinds.count("thinking")
    return {
        "tokens": tokens,
        "conversation": conversation,
        "message": message,
        "first": -len(shared),
        "label": None,
        "live": live,
        "newest": newest_step(own),
        "blue": colour == "settle layer",
        "name": colour if steps else "",
        "low": low,
        "high": high,
        "status": status,
        "bad": bad,
        "thinking": f"Thinking · {counted(thinking, 'token')}" if thinking else "",
        # A reply that is nothing but thinking stays open.
        "fold": 0 < thinking < len(kinds),
        # A live reply is sent a few times a second, and is not complete enough to save.
        "rows": [] if live else step_rows(own),
    }


# A complete reply that the model itself did not end.
_CUT = {"token limit": "cut at the token limit", "context full": "cut: the context is full"}


def status_line(message: Message, tokens: int, size: str) -> str:
    """How a reply ended, or how far it is; ``size`` is what its tensors take, in words.

    A reply that failed has one sentence: what failed, and how to fix it.
    """
    status, reason = str(message.status), message.reason
    if message.damage:
        return (
            f"This reply is damaged in the store: {message.damage.rstrip('.')}. Restore a backup, "
            "or delete the conversation."
        )
    if message.status is Status.FAILED:
        return reason or "This reply failed, and no reason was recorded."
    if message.status is Status.INTERRUPTED:
        return f"Interrupted: {reason}" if reason else "This reply was interrupted."
    if message.status is Status.STOPPED and reason not in (None, "", "stopped"):
        status += f" ({reason})"
    if message.status is Status.COMPLETE:
        status = _CUT.get(reason or "", status)
    if not tokens and not message.status.is_live:
        return status
    speed = f"{tokens / message.seconds:.1f} tokens/s" if message.seconds else ""
    parts = (status, counted(tokens, "token"), speed, size, message.model_id)
    return " · ".join(part for part in parts if part)


def part_kinds(parts: Sequence[Part], steps: int) -> list[PartKind]:
    """The kind of part that each step belongs to; "answer" where it is not known."""
    kinds: list[PartKind] = ["answer"] * steps
    for part in parts:
        for index in range(part.start, min(part.end, steps)):
            kinds[index] = part.kind
    return kinds


def step_rows(steps: Sequence[StepSummary]) -> list[list[Any]]:
    """The tokens and their numbers as rows of a CSV file, with a header; steps count from 0."""
    names = [
        *("step", "position", "token", "token_id", "prob", "rank"),
        *("surprisal_nats", "entropy_nats", "margin", "settle_layer"),
    ]
    rows = [
        [
            *(_step_number(s), s.position, visible(s.token), s.token_id, finite(s.prob), s.rank),
            *(finite(-s.logprob), finite(s.entropy), finite(s.margin), s.settle_layer),
        ]
        for s in steps
    ]
    return [names, *rows] if rows else []


def _step_number(step: StepSummary) -> int | None:
    """The number of a generated token; a given one has none."""
    return None if step.origin == "given" else step.step_index


def shades(
    steps: Sequence[StepSummary], colour: Colour, layers: int
) -> tuple[list[float | None], str, str]:
    """A shade from 0 to 1 for each step, and the labels of the two ends."""
    if colour == "margin":
        return [finite(1 - s.margin) for s in steps], "1", "0 (a near tie)"
    if colour == "settle layer":
        # From the reply's own lowest: most tokens settle late, and would all look alike.
        low = min((s.settle_layer for s in steps if s.settle_layer is not None), default=0)
        depth = max(layers - low, 1)
        shades = [None if s.settle_layer is None else (s.settle_layer - low) / depth for s in steps]
        return shades, f"layer {low}", f"{layers}"
    raw = [finite(s.surprisal if colour == "surprisal" else s.entropy) for s in steps]
    top = max([1.0, *(value for value in raw if value is not None)])
    return [None if value is None else value / top for value in raw], "0", f"{top:.1f} nats"


def token_tooltip(step: StepSummary) -> str:
    """A token's numbers in four lines."""
    settled = (
        "not settled" if step.settle_layer is None else f"settled at layer {step.settle_layer}"
    )
    place = f"step {step.step_index}"
    if step.origin == "given":
        place = f"position {step.position}, given"
    return (
        f"{visible(step.token)}  (id {step.token_id}, {place})\n"
        f"prob {format_number(step.prob, 3)} · rank {step.rank}\n"
        f"surprisal {format_number(step.surprisal, 2, ' nats')} · "
        f"entropy {format_number(step.entropy, 2, ' nats')}\n"
        f"margin {format_number(step.margin, 3)} · {settled}"
    )


def newest_step(steps: Sequence[StepSummary]) -> int | None:
    """The last step that has its lens, or the last of all: the panel follows it while decoding."""
    ready = [s.step_index for s in steps if s.settle_layer is not None]
    return ready[-1] if ready else (steps[-1].step_index if steps else None)


def most_surprising_step(steps: Sequence[StepSummary], parts: Sequence[Part] = ()) -> int | None:
    """The step with the least likely token outside of thinking: the one to show first."""
    kinds = part_kinds(parts, len(steps))
    outside = [s for s, kind in zip(steps, kinds, strict=True) if kind != "thinking"] or steps
    rated = [s for s in outside if math.isfinite(s.logprob)] or outside[:1]
    return min(rated, key=lambda s: s.logprob).step_index if rated else None


# How the special tokens of most vocabularies look.
_SPECIAL = re.compile(r"<[|｜/]?[^<>\s]+>|\[/?[A-Z_]{2,}\]")


def bubble_data(text: str, label: str, prompt: Prompt | None = None) -> Json:
    """The data of ``components/bubble.js``: a message in pieces, typed special tokens marked.

    ``prompt`` is one that contains the message: it tells which texts became special tokens.
    """
    typed: set[str] = set()
    if prompt is not None:
        typed = {
            token
            for token, segment in zip(prompt.tokens, prompt.segments, strict=True)
            if segment in ("system", "user", "tool") and _SPECIAL.fullmatch(token)
        }
    pieces = (
        re.split("(" + "|".join(map(re.escape, sorted(typed))) + ")", text) if typed else [text]
    )
    return {
        "pieces": [{"text": piece, "mark": piece in typed} for piece in pieces if piece],
        "label": label,
    }


def facts_data(
    step: Step,
    summary: StepSummary,
    total: int,
    *,
    conversation: int = 0,
    message: int = 0,
    following: bool = False,
    first: int = 0,
    prompt_len: int | None = None,
    branch: int | None = None,
    scored: bool = False,
) -> Json:
    """The data of ``components/facts.js``: the token, its numbers, and where the reader is.

    ``first`` is the first step, below 0 for a traced prompt of ``prompt_len`` tokens, which
    is None where a token of the reply is shown.
    ``scored``: that prompt is a scored text.
    ``following``: no step was chosen, so the panel moves on to the newest of a live reply.
    """
    facts = {
        "prob": format_number(step.prob, 3),
        "rank": f"{step.rank:,}",
        "surprisal": format_number(step.surprisal, 2, " nats"),
        "entropy": format_number(step.entropy, 2, " nats"),
        "margin": format_number(step.margin, 3),
        "settled": "–" if summary.settle_layer is None else f"layer {summary.settle_layer}",
    }
    names, values = step_rows([summary])
    if step.sampled_prob is not None:
        sampled = format_number(step.sampled_prob, 3)
        facts = {"prob": facts["prob"], "sampled": sampled, **facts}
        names.append("sampled_prob")
        values.append(finite(step.sampled_prob))
    return {
        "conversation": conversation,
        "message": message,
        "step": step.step_index if prompt_len is None else step.position - prompt_len,
        "first": first,
        "total": total,
        "position": None if prompt_len is None else step.position,
        "branch": branch,
        "following": following,
        "waiting": step.lens is None,
        "where": f"step {step.step_index + 1} of {total} · position {step.position}"
        if prompt_len is None
        else f"position {step.position} of {prompt_len} in the {'text' if scored else 'prompt'}",
        "what": visible(step.token),
        "facts": [{"name": n, "value": v, "title": MEANINGS[n]} for n, v in facts.items()],
        "rows": [names, values],
    }


def decision_text(step: Step, generation: Generation | None) -> str:
    """Why this token was chosen, in a few sentences with its spaces made visible."""
    if step.origin == "given":
        return (
            "Given: this token is part of the text that the model read, and the model did not "
            "choose it. The numbers say how likely it was after the text before it."
        )
    if step.origin != "forced" and step.decision is None and generation and generation.do_sample:
        sampled = step.sampled_prob
        prob = "" if sampled is None else f" with probability {format_number(sampled, 3)}"
        text = f"Sampled{prob}; the effect of each setting was not recorded."
    else:
        text = explain(step, lambda token: quoted(shorten(visible(token))))
    replaced = explain_generation(generation) if generation is not None else ""
    return f"{text} The reply was {replaced}." if replaced else text


def why_no_tensors(message: Message) -> str:
    """Why a reply's full tensors are missing: a relative clause that ends a sentence on them."""
    pruned = message.tensors_pruned_at
    if pruned is not None:
        return f"which were pruned on {pruned:%Y-%m-%d}"
    if message.capture is not None and message.capture.tensors_left_out:
        return "which were left out of the export"
    return "which were not kept"


class Badge(NamedTuple):
    """How far a reply's numbers can be trusted, in a word; ``meaning`` is its tooltip."""

    name: str
    colour: Literal["green", "gray", "red"]
    meaning: str


def model_summary(capture: CaptureReport) -> str:
    """A model as it was loaded, in a line."""
    precision = capture.quantization or capture.dtype
    return f"{precision} · {capture.device} · {capture.layers} layers × {capture.width:,} wide"


def settings_summary(sampling: Sampling, policy: CapturePolicy, system: str | None) -> str:
    """The settings that a message is sent with, in a line."""
    how = "greedy" if sampling.temperature is None else f"temperature {sampling.temperature:g}"
    parts = [how, f"up to {sampling.max_new_tokens:,} tokens"]
    parts.append(
        "no full tensors" if policy.tensors == "none" else f"full tensors: {policy.tensors}"
    )
    if policy.trace_prompt != "light":
        parts.append("full trace of the prompt" if policy.trace_prompt else "prompt not traced")
    if system:
        parts.append("a system message")
    return " · ".join(parts)


def format_difference(largest: float) -> str:
    """The largest difference that a check measured: ``exact`` or ``1e-05``."""
    return "exact" if largest == 0 else f"{largest:.0e}"


LENS_CHECK = (
    "The largest difference in log-probability between the lens at the last layer and the model's "
    "own logits, in nats, over all of them: at load, and at some steps of this reply"
)
LENS_DRAFT = (
    "For speed, inner layers were drafted in bfloat16 and their best tokens computed in float32. "
    "This is the largest difference in probability that drafting made, at load and at a step of "
    "this reply. With exact tensors, nothing is drafted"
)
ATTENTION_CHECK = (
    "The largest difference in weight between the captured attention and the model's own eager "
    "attention"
)


def trust_badges(message: Message) -> list[Badge]:
    """The checks of a reply against its model, with their outcome; it has a capture report."""
    capture, checks = message.capture, message.checks
    assert capture is not None
    badges = []
    if checks is not None and checks.fault is not None:
        badges.append(Badge("check failed", "red", str(check_warning(message))))
    if checks is not None:
        badges += [Badge("note", "gray", note) for note in checks.notes]

    def measured(name: str, largest: float | None, meaning: str) -> None:
        if largest is not None:
            badges.append(Badge(f"{name} {format_difference(largest)}", "green", meaning))

    if not capture.logit_lens_available:
        badges.append(Badge("no lens", "gray", capture.lens_reason or "Not available"))
    elif message.lens_check is not None:
        measured("lens check", message.lens_check, LENS_CHECK)
        measured("lens draft", message.lens_draft, LENS_DRAFT)
    measured("attention check", capture.attention_check, ATTENTION_CHECK)
    if capture.attention_check is None and not capture.attention_layers:
        badges.append(Badge("no attention", "gray", capture.evidence_provenance))
    return badges


def check_warning(message: Message) -> str | None:
    """Why not to rely on a reply's lens or attention; None if its checks found nothing."""
    if message.checks is None or message.checks.fault is None:
        return None
    fault = message.checks.fault
    return (
        f"{fault[:1].upper()}{fault[1:]}. The model changed while it replied, so do not rely on "
        "the lens and the attention of this reply."
    )


EFFECT_COLUMNS = (
    Column("setting"),
    Column("removed", "How many tokens it removed", True),
    Column("with prob", "The total probability of the removed tokens", True),
    Column("chosen after", "The chosen token's probability after this setting", True),
)


def effects_data(step: Step) -> Json | None:
    """What each sampling setting did to the distribution, a row each; None without any."""
    rows = effects_table(step)
    name = f"settings-step-{step.step_index}"
    return table_data("Effect of each setting", EFFECT_COLUMNS, rows, name=name) if rows else None


def _beyond(step: Step, *, drawn: bool) -> Json:
    """The chosen token as a candidate, where it ranks below those that were kept."""
    return {
        "text": visible(step.token),
        "prob": finite(step.prob),
        "sampled": finite(step.sampled_prob) if drawn and step.sampled_prob is not None else None,
        "id": step.token_id,
        "logit": finite(step.logit),
        "chosen": True,
        "rank": step.rank,
        "title": f"rank {step.rank:,} · id {step.token_id} · "
        f"logit {format_number(step.logit, 2)} · prob {format_number(step.prob, 5)}",
    }


def candidates_data(step: Step, *, branch: bool = False) -> Json:
    """The data of ``components/bars.js``; ``branch``: whether the reply can go on from each."""
    top = step.topk
    sampled = None if top.sampled_probs is None else top.sampled_probs.tolist()
    rows = []
    for k, (token_id, text, logit, prob) in enumerate(
        zip(
            *(top.token_ids.tolist(), top.tokens, top.logits.tolist(), top.probs.tolist()),
            strict=True,
        )
    ):
        title = (
            f"rank {k + 1} · id {token_id} · logit {format_number(logit, 2)} · "
            f"prob {format_number(prob, 5)}"
        )
        if sampled is not None:
            title += f" · after sampling {format_number(sampled[k], 5)}"
        rows.append(
            {
                "text": visible(text),
                "prob": finite(prob),
                "sampled": None if sampled is None else finite(sampled[k]),
                "id": token_id,
                "logit": finite(logit),
                "chosen": token_id == step.token_id,
                "rank": k + 1,
                "title": title,
            }
        )
    if rows and step.rank > len(rows):
        rows.append(_beyond(step, drawn=sampled is not None))
    return {
        "rows": rows,
        "sampled": sampled is not None,
        "step": step.step_index,
        "branch": branch,
    }
