"""From records to what the page's elements draw: pure functions, no Streamlit.

Here the reply and the numbers of one step; ``lens_shapes`` and
``attention_shapes`` have the rest.

Text leaves here as plain strings with spaces and line ends made visible where
a token stands alone, and as it is where it is part of a running text.
"""

from __future__ import annotations

import codecs
import datetime as dt
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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
    Step,
    StepSummary,
)
from oki_trace.reporting import counted as counted
from oki_trace.sanitize import inert, visible

Colour = Literal["surprisal", "entropy", "margin", "settle layer"]
COLOURS: tuple[Colour, ...] = ("surprisal", "entropy", "margin", "settle layer")

Json = dict[str, Any]


def clickable(text: str) -> str:
    """A piece of running text; a line end has a mark before it, being no wider than nothing."""
    return text.replace("\n", "⏎\n")


def known(value: float) -> float | None:
    """``value``, or None where it is no number: an import may lack it, float16 may overflow."""
    return value if math.isfinite(value) else None


def figure(value: float, digits: int, unit: str = "") -> str:
    """``value`` with so many digits, a dash where it is no number; never 0 for what is not."""
    if not math.isfinite(value):
        return "–"
    least = 10.0**-digits
    if 0 < abs(value) < least / 2:
        return f"{'>-' if value < 0 else '<'}{least:.{digits}f}{unit}"
    return f"{value:z.{digits}f}{unit}"


def plain(text: str) -> str:
    """``text`` for a place that is read as Markdown, where it is to stand as it is.

    What Markdown would read as its own is escaped. Streamlit looks for addresses,
    icons, emoji and arrows after that, so a joiner, which is not seen, keeps the
    characters apart by which it knows them.
    """
    return _MARKDOWN.sub(r"\\\g<0>", _KNOWN_BY.sub(_JOINER, inert(text)))


def sentence(text: str) -> str:
    """``text``, ended as a sentence is, safe where Markdown is read: it may name a model."""
    return f"{plain(text.rstrip('.'))}."


_JOINER = "\u2060"
_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+\-.!|:$<>~=&]")
_KNOWN_BY = re.compile(
    r"(?<=www)(?=\.)"  # an address without a scheme
    r"|(?=@)|(?<=@)"  # one of mail
    r"|(?<=:)(?=\S)"  # one with a scheme; :emoji:, :material/icon:, :red[text]
    r"|(?<=[-<>~=])(?=[-<>~=])"  # arrows and dashes
    r"|^(?=[ \t])",  # a line that begins with spaces is code
    re.IGNORECASE | re.MULTILINE,
)


def running_text(steps: Sequence[StepSummary]) -> list[str]:
    """Each token's part of the reply's text: a character stands with the token that ends it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(step.token_bytes) for step in steps]


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
) -> Json:
    """What the reply element draws (see ``components/reply.js``)."""
    kinds = part_kinds(parts, len(steps))
    values, low, high = scale(steps, colour, layers)
    texts = running_text(steps)
    tokens = [
        {
            "text": visible(s.token) if s.is_special else (clickable(text) or "◌"),
            "value": None if value is None else round(value, 3),
            "mark": s.is_special or not text.strip("\n"),
            "title": hover(s),
            **({} if kind == "answer" else {"part": kind}),
        }
        for s, text, value, kind in zip(steps, texts, values, kinds, strict=True)
    ]
    thinking = kinds.count("thinking")
    return {
        "tokens": tokens,
        "conversation": conversation,
        "message": message,
        "live": live,
        "newest": newest(steps),
        "blue": colour == "settle layer",
        "name": colour if steps else "",
        "low": low,
        "high": high,
        "status": status,
        "bad": bad,
        "thinking": f"Thinking · {counted(thinking, 'token')}" if thinking else "",
        # What is all there is to see is not folded.
        "fold": 0 < thinking < len(kinds),
        # While it grows it is sent a few times a second, and is no whole to save.
        "rows": [] if live else numbers(steps),
    }


def part_kinds(parts: Sequence[Part], steps: int) -> list[PartKind]:
    """Which kind of part each step is of; an answer where that is not known."""
    kinds: list[PartKind] = ["answer"] * steps
    for part in parts:
        for index in range(part.start, min(part.end, steps)):
            kinds[index] = part.kind
    return kinds


def numbers(steps: Sequence[StepSummary]) -> list[list[Any]]:
    """The tokens and their numbers as a sheet; steps count from 0, what is in nats says so."""
    names = [
        *("step", "position", "token", "token_id", "prob", "rank"),
        *("surprisal_nats", "entropy_nats", "margin", "settle_layer"),
    ]
    rows = [
        [
            s.step_index,
            s.position,
            visible(s.token),
            s.token_id,
            known(s.prob),
            s.rank,
            known(-s.logprob),
            known(s.entropy),
            known(s.margin),
            s.settle_layer,
        ]
        for s in steps
    ]
    return [names, *rows] if rows else []


def scale(
    steps: Sequence[StepSummary], colour: Colour, layers: int
) -> tuple[list[float | None], str, str]:
    """A shade from 0 to 1 for each step, and what the two ends stand for."""
    if colour == "margin":
        return [known(1 - s.margin) for s in steps], "1", "0 (a near tie)"
    if colour == "settle layer":
        # From the reply's own lowest: most tokens settle late, and would look all alike.
        low = min((s.settle_layer for s in steps if s.settle_layer is not None), default=0)
        depth = max(layers - low, 1)
        shades = [None if s.settle_layer is None else (s.settle_layer - low) / depth for s in steps]
        return shades, f"layer {low}", f"{layers}"
    raw = [known(s.surprisal if colour == "surprisal" else s.entropy) for s in steps]
    top = max([1.0, *(value for value in raw if value is not None)])
    return [None if value is None else value / top for value in raw], "0", f"{top:.1f} nats"


def hover(step: StepSummary) -> str:
    """A token's numbers in a few lines."""
    settled = (
        "not settled" if step.settle_layer is None else f"settled at layer {step.settle_layer}"
    )
    return (
        f"{visible(step.token)}  (id {step.token_id}, step {step.step_index})\n"
        f"prob {figure(step.prob, 3)} · rank {step.rank}\n"
        f"surprisal {figure(step.surprisal, 2, ' nats')} · "
        f"entropy {figure(step.entropy, 2, ' nats')}\n"
        f"margin {figure(step.margin, 3)} · {settled}"
    )


def newest(steps: Sequence[StepSummary]) -> int | None:
    """The last step whose lens is there, or the last of all; it is followed while decoding."""
    ready = [s.step_index for s in steps if s.settle_layer is not None]
    return ready[-1] if ready else (steps[-1].step_index if steps else None)


def most_surprising(steps: Sequence[StepSummary], parts: Sequence[Part] = ()) -> int | None:
    """The step with the least likely token, outside of thinking: where to look first."""
    kinds = part_kinds(parts, len(steps))
    open_ones = [s for s, kind in zip(steps, kinds, strict=True) if kind != "thinking"] or steps
    rated = [s for s in open_ones if math.isfinite(s.logprob)] or open_ones[:1]
    return min(rated, key=lambda s: s.logprob).step_index if rated else None


# How the special tokens of most vocabularies look.
_SPECIAL = re.compile(r"<[|｜/]?[^<>\s]+>|\[/?[A-Z_]{2,}\]")


def bubble_data(text: str, label: str, prompt: Prompt | None = None) -> Json:
    """A message in pieces: a special token that was typed is one to the model, and marked.

    ``prompt`` is what the model was given of it.
    """
    typed: set[str] = set()
    if prompt is not None:
        typed = {
            token
            for token, segment in zip(prompt.tokens, prompt.segments, strict=True)
            if segment in ("system", "user", "tool") and _SPECIAL.fullmatch(token)
        }
    cuts = re.split("(" + "|".join(map(re.escape, sorted(typed))) + ")", text) if typed else [text]
    pieces = [{"text": piece, "mark": piece in typed} for piece in cuts if piece]
    return {"pieces": pieces, "label": label}


NO_STEP: Json = {"empty": True}


def facts_data(
    step: Step,
    summary: StepSummary,
    total: int,
    *,
    conversation: int = 0,
    message: int = 0,
    following: bool = False,
) -> Json:
    """The head of the step panel: the token, its numbers, and where the reader is.

    ``following``: nobody chose this step, so the newest one of a live reply takes its place.
    """
    settled = "–" if summary.settle_layer is None else f"layer {summary.settle_layer}"
    names, values = numbers([summary])
    facts = [
        ("prob", figure(step.prob, 3), "The model's own probability, before any sampling setting"),
        ("rank", f"{step.rank:,}", "Among all tokens of the vocabulary; 1 is the most likely"),
        ("surprisal", figure(step.surprisal, 2, " nats"), "-log prob of the chosen token"),
        (
            "entropy",
            figure(step.entropy, 2, " nats"),
            "Of the whole next-token distribution: 0 when the model is certain",
        ),
        (
            "margin",
            figure(step.margin, 3),
            "Probability of the likeliest token less the next one's",
        ),
        ("settled", settled, "The first layer from which the chosen token stays on top"),
    ]
    if step.sampled_prob is not None:
        facts.insert(
            1,
            (
                "sampled",
                figure(step.sampled_prob, 3),
                "Its probability after temperature, cuts and penalties",
            ),
        )
        names.append("sampled_prob")
        values.append(known(step.sampled_prob))
    return {
        "conversation": conversation,
        "message": message,
        "step": step.step_index,
        "total": total,
        "following": following,
        "waiting": step.lens is None,
        "where": f"step {step.step_index + 1} of {total} · position {step.position}",
        "what": visible(step.token),
        "facts": [{"name": n, "value": v, "title": t} for n, v, t in facts],
        "rows": [names, values],
    }


def decision(step: Step, generation: Generation | None) -> str:
    """Why this token, in a few sentences; what a token says stands in them as it is seen."""
    if step.decision is None and generation is not None and generation.do_sample:
        after = "" if step.sampled_prob is None else f": it had {figure(step.sampled_prob, 3)}"
        told = f"Drawn{after}; how the settings came to that is not recorded."
    else:
        told = explain(step, lambda token: quoted(clipped(visible(token))))
    replaced = explain_generation(generation) if generation is not None else ""
    return f"{told} The reply was {replaced}." if replaced else told


def sheet(rows: Sequence[Json]) -> list[list[Any]]:
    """``rows`` as a sheet: the names of the columns, then their values; times as ISO 8601."""
    if not rows:
        return []
    values = [
        [v.isoformat() if isinstance(v, dt.datetime) else v for v in row.values()] for row in rows
    ]
    return [list(rows[0]), *values]


def absence(message: Message) -> str:
    """Why a reply's full tensors are not there, as the end of a sentence on them."""
    pruned = message.tensors_pruned_at
    if pruned is not None:
        return f"which were pruned on {pruned:%Y-%m-%d}"
    if message.capture is not None and message.capture.tensors_left_out:
        return "which were left out of the export"
    return "which were not kept"


def clipped(text: str, length: int = 40) -> str:
    """``text``, cut off where it is too long to stand in a line."""
    return text if len(text) <= length else f"{text[:length]}…"


class Badge(NamedTuple):
    """A word on how far something can be trusted, and what it rests on."""

    name: str
    colour: Literal["green", "gray", "red"]
    meaning: str


def model_line(capture: CaptureReport) -> str:
    """A model as it was loaded, in a line."""
    precision = capture.quantization or capture.dtype
    return f"{precision} · {capture.device} · {capture.layers} layers × {capture.width:,} wide"


def settings_line(sampling: Sampling, policy: CapturePolicy, system: str | None) -> str:
    """What a message is sent with, in a line."""
    how = "greedy" if sampling.temperature is None else f"temperature {sampling.temperature:g}"
    parts = [how, f"up to {sampling.max_new_tokens:,} tokens"]
    parts.append("no full tensors" if policy.tensors == "none" else f"{policy.tensors} tensors")
    if system:
        parts.append("a system message")
    return " · ".join(parts)


def check(largest: float) -> str:
    """The largest difference that a check found, in few characters."""
    return "exact" if largest == 0 else f"{largest:.0e}"


def trust(message: Message) -> list[Badge]:
    """What of a reply was held against its model, with what outcome; it has a capture report."""
    capture = message.capture
    assert capture is not None
    badges = []
    if message.checks is not None and message.checks.fault is not None:
        badges.append(Badge("check failed", "red", str(doubt_of(message))))
    if message.checks is not None:
        badges += [Badge("note", "gray", note) for note in message.checks.notes]
    lens_check, lens_draft = message.lens_check, message.lens_draft
    if capture.logit_lens_available and lens_check is not None:
        meaning = (
            "The largest difference in log-probability between the lens at the last layer and the "
            "model's own logits, all of them, in nats: when the model was loaded, and at some "
            "steps of this reply"
        )
        badges.append(Badge(f"lens check {check(lens_check)}", "green", meaning))
        if lens_draft is not None:
            meaning = (
                "Inner layers were drafted in bfloat16, and their best tokens computed in float32, "
                "for speed. This is the largest difference in probability that it made when the "
                "model was loaded, and at a step of this reply; with tensors kept exact nothing is "
                "drafted"
            )
            badges.append(Badge(f"lens draft {check(lens_draft)}", "green", meaning))
    elif not capture.logit_lens_available:
        badges.append(Badge("no lens", "gray", capture.lens_reason or "Not available"))
    if capture.attention_check is not None:
        meaning = (
            "The largest difference in weight between the captured attention and the model's own "
            "eager attention"
        )
        badges.append(Badge(f"attention check {check(capture.attention_check)}", "green", meaning))
    elif not capture.attention_layers:
        badges.append(Badge("no attention", "gray", capture.evidence_provenance))
    return badges


def doubt_of(message: Message) -> str | None:
    """Why a reply's lens or attention is not to be relied on; None if its checks found nothing."""
    if message.checks is None or message.checks.fault is None:
        return None
    fault = message.checks.fault
    return (
        f"{fault[:1].upper()}{fault[1:]}. The model changed while it replied, so do not rely on "
        "the lens and the attention of this reply."
    )


class Column(NamedTuple):
    """A column of a table: its title, and what hovering over it tells."""

    title: str
    meaning: str = ""
    is_number: bool = False


def table_data(
    label: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    name: str = "",
    marked: Sequence[int] = (),
) -> Json:
    """What the table element draws; ``name``: what it is saved as, empty where it is not."""
    return {
        "label": label,
        "name": name,
        "head": [{"text": c.title, "title": c.meaning, "num": c.is_number} for c in columns],
        "rows": [list(row) for row in rows],
        "marked": list(marked),
    }


EFFECT_COLUMNS = (
    Column("setting"),
    Column("removed", "How many tokens it took out", True),
    Column("with prob", "The probability that these had together", True),
    Column("chosen after", "The chosen token's probability after this setting", True),
)


def effects_data(step: Step) -> Json | None:
    """What each sampling setting did to the distribution, a row each; None without any."""
    rows = effects_table(step)
    name = f"settings-step-{step.step_index + 1}"
    label = "What each setting did"
    return table_data(label, EFFECT_COLUMNS, rows, name=name) if rows else None


def bars_data(step: Step) -> Json:
    """What the bars of the candidates show."""
    top = step.topk
    sampled = top.sampled_probs
    rows = [
        {
            "text": visible(text),
            "prob": known(prob),
            "sampled": None if sampled is None else known(float(sampled[k])),
            "id": token_id,
            "logit": known(logit),
            "chosen": token_id == step.token_id,
            "title": f"rank {k + 1} · id {token_id} · logit {figure(logit, 2)} · "
            f"prob {figure(prob, 5)}"
            + ("" if sampled is None else f" · after sampling {figure(float(sampled[k]), 5)}"),
        }
        for k, (token_id, text, logit, prob) in enumerate(
            zip(
                top.token_ids.tolist(),
                top.tokens,
                top.logits.tolist(),
                top.probs.tolist(),
                strict=True,
            )
        )
    ]
    return {"rows": rows, "sampled": sampled is not None, "step": step.step_index}
