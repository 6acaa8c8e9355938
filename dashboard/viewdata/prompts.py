"""The data of the text that a model was given: pure functions of records.

A token of a prompt has no step number. Components count it backwards from the reply: -1
is the last token of the prompt, so that the reply's step 0 follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dashboard.viewdata.replies import (
    Colour,
    shades,
    status_line,
    step_rows,
    token_data,
    token_texts,
    token_tooltip,
)
from dashboard.viewdata.wording import Json, format_number
from oki_trace.likelihood import score_of
from oki_trace.records import Message, Prompt, Status, StepSummary
from oki_trace.reporting import counted

Traced = Mapping[int, StepSummary]


def given_data(
    prompt: Prompt,
    traced: Traced,
    span: range,
    *,
    conversation: int,
    message: int,
    colour: Colour,
    layers: int,
    label: str | None,
    status: str = "",
    bad: bool = False,
) -> Json:
    """The data of ``components/reply.js`` for the tokens at ``span`` of a prompt.

    ``label``: the role of the message, "" for the user's, None for a scored text. A token
    that was not traced is shown without a shade.
    """
    steps = [traced[at] for at in span if at in traced]
    values, low, high = shades(steps, colour, layers)
    shade = dict(zip((s.position for s in steps), values, strict=True))
    text_of = dict(zip((s.position for s in steps), token_texts(steps), strict=True))
    tokens: list[Json] = []
    for at in span:
        if at in traced:
            value = shade[at]
            tokens.append(
                {
                    **token_data(traced[at], text_of[at]),
                    "value": None if value is None else round(value, 3),
                    "title": token_tooltip(traced[at]),
                }
            )
        else:
            title = f"position {at}: not traced"
            if at == 0:
                title = "The first token: nothing before it predicts it"
            tokens.append(
                {"text": prompt.tokens[at], "mark": False, "value": None, "title": title}
                | {"untraced": True}
            )
    return {
        "tokens": tokens,
        "conversation": conversation,
        "message": message,
        "first": span.start - len(prompt),
        "label": label,
        "live": False,
        "newest": None,
        "blue": colour == "settle layer",
        "name": colour if steps else "",
        "low": low,
        "high": high,
        "status": status or score_text(steps),
        "bad": bad,
        "thinking": "",
        "fold": False,
        "rows": step_rows(steps),
    }


def score_text(steps: Sequence[StepSummary], *, whole: bool = False) -> str:
    """How likely the model found these given tokens; ``whole`` has the totals of a scored text."""
    if not steps:
        return ""
    score = score_of(steps)
    parts = [f"{counted(score.tokens, 'token')} given"]
    if whole:
        parts.append(f"logprob {format_number(score.logprob, 2, ' nats')}")
    parts.append(f"perplexity {format_number(score.perplexity, 2)}")
    if whole and math.isfinite(score.bits_per_byte):
        parts.append(f"{format_number(score.bits_per_byte, 3)} bits per byte")
    return " · ".join(parts)


def scored_status(message: Message, steps: Sequence[StepSummary]) -> str:
    """How a scored text ended, and its score."""
    if message.status is Status.COMPLETE and not message.damage:
        end = ""
    else:
        end = status_line(message, 0, "").rstrip(".")
    parts = (end, score_text(steps, whole=True), message.model_id)
    return " · ".join(part for part in parts if part)


def most_surprising_position(traced: Traced) -> int | None:
    """The position of the least likely given token: the one to show first of a scored text."""
    if not traced:
        return None
    steps = list(traced.values())
    rated = [s for s in steps if math.isfinite(s.logprob)] or steps[:1]
    return min(rated, key=lambda s: s.logprob).position


def nearest_position(traced: Traced, position: int) -> int | None:
    """The traced position nearest to ``position``; None if there is none."""
    return min(traced, key=lambda at: abs(at - position), default=None)
