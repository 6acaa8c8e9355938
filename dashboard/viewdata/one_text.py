"""The data of the Compare page for one text under two models: pure functions, no Streamlit.

By token, the measure of a pair is the total variation; by characters, the difference in bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dashboard.viewdata.comparison import Distances, in_words
from dashboard.viewdata.replies import MEANINGS, token_data, token_texts, token_tooltip
from dashboard.viewdata.wording import Column, Json, format_number, shorten, table_data
from oki_trace.analysis.one_text import OneText, Span
from oki_trace.likelihood import Score, score_of
from oki_trace.records import Message, StepSummary
from oki_trace.sanitize import visible

Bits = tuple[float, float]


def bits(text: OneText) -> list[Bits]:
    """The surprisal of each span in bits, in the left and the right message."""
    return [
        (_bits(text.left[slice(*span.left)]), _bits(text.right[slice(*span.right)]))
        for span in text.spans
    ]


def _bits(steps: Sequence[StepSummary]) -> float:
    return math.fsum(step.surprisal for step in steps) / math.log(2)


def most_different(text: OneText, distances: Distances) -> int:
    """The number of the span that differs most."""
    measures = _measures(text, distances)
    return max(range(len(measures)), key=measures.__getitem__)


def _measures(text: OneText, distances: Distances) -> list[float]:
    """How much each span differs, from 0 to 1; 0 where it is not known."""
    if text.by == "token":
        measures = [0.0 if distance is None else distance.tv for distance in distances]
    else:
        differences = [abs(left - right) for left, right in bits(text)]
        largest = max((d for d in differences if math.isfinite(d)), default=0.0)
        measures = [d / largest if largest else 0.0 for d in differences]
    return [m if math.isfinite(m) else 0.0 for m in measures]


def text_data(
    messages: tuple[Message, Message], text: OneText, distances: Distances, chosen: int
) -> Json:
    """The data of ``components/compare.js``: the shared text in the tokens of each message."""
    measures = _measures(text, distances)
    of_spans = bits(text)
    sides = []
    for side, message in enumerate(messages):
        steps, given = (text.left, text.right)[side], text.given[side]
        texts = token_texts(steps)
        tokens: list[Json] = []
        for number, span in enumerate(text.spans):
            if text.by == "token":
                measure = f"total variation {in_words(distances[number])}"
            else:
                one, two = of_spans[number]
                measure = f"{_quote(span)}: {format_number(one, 2)} bits left, "
                measure += f"{format_number(two, 2)} right"
            for index in range(*(span.left, span.right)[side]):
                step = steps[index]
                place = {"position": step.position} if given else {"step": step.step_index}
                tokens.append(
                    {
                        **token_data(step, texts[index]),
                        **place,
                        "pair": number,
                        "same": True,
                        "first": False,
                        "heat": round(measures[number], 3),
                        "title": f"{token_tooltip(step)}\n{measure}",
                    }
                )
        own = {"conversation": message.conversation_id, "message": message.id}
        sides.append({"tokens": tokens, **own, "empty": ""})
    return {"sides": sides, "chosen": chosen, "rows": sheet(text, distances)}


def sheet(text: OneText, distances: Distances) -> list[list[Any]]:
    """The spans as rows of a CSV."""
    places = ["pair", "left_position", "right_position"]
    rows: list[list[Any]]
    if text.by == "token":
        numbers = ("left_logprob", "right_logprob", "left_rank", "right_rank")
        bounds = ("least_total_variation", "most_total_variation")
        rows = [[*places, "token", *numbers, *bounds]]
    else:
        rows = [[*places, "text", "bytes", "left_bits", "right_bits"]]
    for number, (span, of_span) in enumerate(zip(text.spans, bits(text), strict=True)):
        left, right = text.left[span.left[0]], text.right[span.right[0]]
        row = [number, left.position, right.position, _quote(span)]
        if text.by == "token":
            found = distances[number]
            row += [_finite(left.logprob), _finite(right.logprob), left.rank, right.rank]
            row += [None, None] if found is None else [found.tv, found.tv_most]
        else:
            row += [len(span.text), *map(_finite, of_span)]
        rows.append(row)
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quote(span: Span) -> str:
    return visible(span.text.decode("utf-8", "replace"))


def rows(text: OneText, distances: Distances) -> list[Json]:
    """A row for each span whose measure is known, for the chart."""
    if text.by == "token":
        return [
            {
                "pair": number,
                "low": distance.tv,
                "high": distance.tv_most,
                "left": shorten(_quote(span)),
                "right": shorten(_quote(span)),
                "token": "the same token",
            }
            for number, (span, distance) in enumerate(zip(text.spans, distances, strict=True))
            if distance is not None
        ]
    return [
        {
            "span": number,
            "text": shorten(_quote(span)),
            "left": left,
            "right": right,
            "difference": right - left,
        }
        for number, (span, (left, right)) in enumerate(zip(text.spans, bits(text), strict=True))
        if math.isfinite(left) and math.isfinite(right)
    ]


TOTALS = (
    Column(""),
    Column("tokens", "Of the text that both have", True),
    Column("logprob", "The sum of their log probabilities, in nats", True),
    Column("perplexity", "Exp of the mean surprisal of a token", True),
    Column("bits per byte", "The surprisal in bits, by the bytes of the text", True),
)


def totals(text: OneText) -> Json:
    """The likelihood of the shared text under both, a row each."""
    rows = []
    for name, side in (("left", text.left), ("right", text.right)):
        spans = [getattr(span, name) for span in text.spans]
        total = score_of(step for span in spans for step in side[slice(*span)])
        if text.by == "character":
            size = sum(len(span.text) for span in text.spans)
            total = Score(total.tokens, size, total.logprob)
        rows.append(
            (
                name,
                f"{total.tokens:,}",
                format_number(total.logprob, 2),
                format_number(total.perplexity, 2),
                format_number(total.bits_per_byte, 3),
            )
        )
    return table_data("The text under both models", TOTALS, rows, name="one-text")


TOKENS = (
    Column(""),
    Column("token"),
    Column("position", "In the text that the model read, counted from 0", True),
    *(Column(name, MEANINGS[name], True) for name in ("prob", "rank", "surprisal", "entropy")),
)


def span_table(text: OneText, number: int) -> Json:
    """The tokens of one span in each message, a row each."""
    span = text.spans[number]
    rows = [
        (
            name,
            shorten(visible(step.token)),
            f"{step.position:,}",
            format_number(step.prob, 3),
            f"{step.rank:,}",
            format_number(step.surprisal, 2),
            format_number(step.entropy, 2),
        )
        for name, steps in (
            ("left", text.left[slice(*span.left)]),
            ("right", text.right[slice(*span.right)]),
        )
        for step in steps
    ]
    return table_data("The tokens of this piece of text", TOKENS, rows, name="one-text-piece")
