"""Two replies side by side: pure functions, no Streamlit.

Replies are aligned by their tokens. How far two steps' distributions are apart
is told by the total variation, from 0 (the same) to 1 (nothing in common):
exactly where both kept their full logits, else as the least and the most it
can be, given the likeliest tokens of each, which are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashboard.viewdata.attention import as_float32
from dashboard.viewdata.replies import token_texts, token_tooltip
from dashboard.viewdata.wording import (
    Column,
    Json,
    counted,
    format_number,
    mark_line_ends,
    shorten,
    table_data,
)
from oki_trace.records import Candidates, Message, Step, StepSummary, Tensor
from oki_trace.sanitize import visible

# Beyond it what follows the divergence is held side by side step by step: to
# find what is said again later takes time that grows with the square.
ALIGNED_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Pair:
    """A place in both replies: the step of each, None where it has no part in it."""

    left: int | None
    right: int | None
    same: bool


def align(left: Sequence[StepSummary], right: Sequence[StepSummary]) -> list[Pair]:
    """The steps of both, in order, with equal tokens beside each other where that can be.

    Tokens are equal when their bytes are, so that two models' can be held
    against each other. What differs stands side by side as far as both go.
    """
    one, two = ([s.token_bytes for s in steps] for steps in (left, right))
    shared = 0
    while shared < min(len(one), len(two)) and one[shared] == two[shared]:
        shared += 1
    pairs = [Pair(i, i, True) for i in range(shared)]
    if max(len(one), len(two)) > ALIGNED_TOKENS:
        for i in range(shared, max(len(one), len(two))):
            both = i < len(one) and i < len(two)
            at = (i if i < len(one) else None, i if i < len(two) else None)
            pairs.append(Pair(*at, both and one[i] == two[i]))
        return pairs
    match = SequenceMatcher(None, one[shared:], two[shared:], autojunk=False)
    for kind, a, a_end, b, b_end in match.get_opcodes():
        for k in range(max(a_end - a, b_end - b)):
            i, j = a + k, b + k
            pairs.append(
                Pair(
                    i + shared if i < a_end else None,
                    j + shared if j < b_end else None,
                    kind == "equal",
                )
            )
    return pairs


def divergence(pairs: Sequence[Pair]) -> int | None:
    """Which pair is the first that differs; None when all are the same."""
    return next((n for n, pair in enumerate(pairs) if not pair.same), None)


def verdict(pairs: Sequence[Pair]) -> str:
    """How much the two have in common, in a sentence."""
    first = divergence(pairs)
    same = sum(pair.same for pair in pairs)
    if first is None:
        return "The one token is the same." if same == 1 else f"All {same:,} tokens are the same."
    other = len(pairs) - same
    return (
        f"They part at token {first + 1:,}; {counted(same, 'token')} {_are(same)} the same, "
        f"{counted(other, 'place')} {_are(other)} not."
    )


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def first_to_see(pairs: Sequence[Pair]) -> int | None:
    """Where to look first: where they part, or the place nearest to it where both have a step.

    What follows comes before what precedes. None when there is no such place.
    """
    at = divergence(pairs) or 0
    both = [n for n, pair in enumerate(pairs) if pair.left is not None and pair.right is not None]
    return next((n for n in both if n >= at), both[-1] if both else None)


# ----------------------------------------------------------------------- distances


@dataclass(frozen=True, slots=True)
class Distance:
    """The total variation is at least ``low`` and at most ``high``: both, when it is exact."""

    low: float
    high: float


def between(left: Candidates, right: Candidates, *, by_id: bool) -> Distance | None:
    """What the likeliest tokens of both tell; None where they are no numbers.

    ``by_id``: tokens are the same when their ids are, as of one model;
    otherwise when their texts are. A token that only one has among its
    likeliest is in the other at most as likely as the last of those.
    """
    p, q = _probs(left, by_id), _probs(right, by_id)
    if not p or not q or not all(map(math.isfinite, (*p.values(), *q.values()))):
        return None
    rest_p, rest_q = (max(0.0, 1 - sum(kept.values())) for kept in (p, q))
    over = sum(max(0.0, p[t] - q[t]) for t in p.keys() & q.keys())
    under = sum(max(0.0, q[t] - p[t]) for t in p.keys() & q.keys())
    only_p = [p[t] for t in p.keys() - q.keys()]
    only_q = [q[t] for t in q.keys() - p.keys()]
    # The total variation is what p has over q, summed; and what q has over p.
    least_p, least_q = min(rest_p, min(p.values())), min(rest_q, min(q.values()))
    from_p = over + max(sum(max(0.0, x - least_q) for x in only_p), sum(only_p) - rest_q, 0.0)
    from_q = under + max(sum(max(0.0, x - least_p) for x in only_q), sum(only_q) - rest_p, 0.0)
    low = max(from_p, from_q)
    high = min(over + sum(only_p) + rest_p, under + sum(only_q) + rest_q, 1.0)
    return Distance(min(low, high), high)


def _probs(kept: Candidates, by_id: bool) -> dict[int | str, float]:
    found: dict[int | str, float] = {}
    keys: Sequence[int | str] = kept.token_ids.tolist() if by_id else kept.tokens
    for key, prob in zip(keys, kept.probs.tolist(), strict=True):
        found[key] = found.get(key, 0.0) + prob
    return found


def exactly(left: Tensor, right: Tensor) -> Distance | None:
    """From the full logits of both; None for two vocabularies."""
    if left.array.shape != right.array.shape:
        return None
    total = float(np.abs(_softmax(left) - _softmax(right)).sum()) / 2
    return Distance(total, total) if math.isfinite(total) else None


def _softmax(logits: Tensor) -> NDArray[np.float64]:
    raw = as_float32(logits).astype(np.float64)
    raised = np.exp(raw - raw.max())
    return np.asarray(raised / raised.sum())


def distances(
    pairs: Sequence[Pair],
    left: Mapping[int, Candidates],
    right: Mapping[int, Candidates],
    *,
    by_id: bool,
) -> list[Distance | None]:
    """Of each pair; None where one of the two has no such step."""
    found: list[Distance | None] = []
    for pair in pairs:
        one = None if pair.left is None else left.get(pair.left)
        two = None if pair.right is None else right.get(pair.right)
        found.append(None if one is None or two is None else between(one, two, by_id=by_id))
    return found


# --------------------------------------------------------------------- what is drawn


def replies_data(
    messages: tuple[Message, Message],
    steps: tuple[Sequence[StepSummary], Sequence[StepSummary]],
    pairs: Sequence[Pair],
    found: Sequence[Distance | None],
    chosen: int | None = None,
) -> Json:
    """What the element of both replies draws (see ``components/compare.js``).

    ``chosen``: the number of the pair that is looked at.
    """
    first = divergence(pairs)
    sides = []
    for message, of_it, side in zip(messages, steps, ("left", "right"), strict=True):
        texts = token_texts(of_it)
        tokens: list[Json] = []
        for number, (pair, distance) in enumerate(zip(pairs, found, strict=True)):
            index = getattr(pair, side)
            if index is None:
                continue
            step, text = of_it[index], texts[index]
            tokens.append(
                {
                    "text": visible(step.token)
                    if step.is_special
                    else (mark_line_ends(text) or "◌"),
                    "mark": step.is_special or not text.strip("\n"),
                    "pair": number,
                    "same": pair.same,
                    "first": number == first,
                    "step": index,
                    "title": f"{token_tooltip(step)}\ntotal variation {told(distance)}"
                    + ("\nhere they part" if number == first else ""),
                }
            )
        sides.append(
            {
                "tokens": tokens,
                "conversation": message.conversation_id,
                "message": message.id,
                "empty": "This reply has no tokens." if not tokens else "",
            }
        )
    return {"sides": sides, "chosen": chosen, "rows": sheet(pairs, found, *steps)}


def sheet(
    pairs: Sequence[Pair],
    found: Sequence[Distance | None],
    left: Sequence[StepSummary],
    right: Sequence[StepSummary],
) -> list[list[Any]]:
    """Both replies, a row a place: the tokens, and how far the distributions are apart."""
    names = [
        *("place", "left_step", "left_token", "right_step", "right_token", "same"),
        *("least_total_variation", "most_total_variation"),
    ]
    return [
        names,
        *(
            [
                number,
                pair.left,
                None if pair.left is None else visible(left[pair.left].token),
                pair.right,
                None if pair.right is None else visible(right[pair.right].token),
                int(pair.same),
                None if distance is None else distance.low,
                None if distance is None else distance.high,
            ]
            for number, (pair, distance) in enumerate(zip(pairs, found, strict=True), start=1)
        ),
    ]


def told(distance: Distance | None) -> str:
    """A distance in words."""
    if distance is None:
        return "not known"
    if distance.high - distance.low < 5e-4:
        return format_number(distance.low, 3)
    return f"{format_number(distance.low, 3)} to {format_number(distance.high, 3)}"


def rows(
    pairs: Sequence[Pair],
    found: Sequence[Distance | None],
    left: Sequence[StepSummary],
    right: Sequence[StepSummary],
) -> list[Json]:
    """A row for each pair whose distance is known, for the picture."""
    return [
        {
            "place": number + 1,
            "low": distance.low,
            "high": distance.high,
            "left": shorten(visible(left[pair.left].token)),
            "right": shorten(visible(right[pair.right].token)),
            "token": "the same token" if pair.same else "different tokens",
        }
        for number, (pair, distance) in enumerate(zip(pairs, found, strict=True))
        if distance is not None and pair.left is not None and pair.right is not None
    ]


SIDES = (Column(""), Column("left"), Column("right"))


def settings(left: Message, right: Message) -> Json:
    """What each reply was made with, as a table; marked are the rows that differ."""
    one, two = _settings(left), _settings(right)
    rows = [(name, one[name], two[name]) for name in one]
    differ = [number for number, (_, a, b) in enumerate(rows) if a != b]
    return table_data("Settings", SIDES, rows, name="settings", marked=differ)


STEPS = (
    Column(""),
    Column("token"),
    Column("step", "In its own reply, counted from 0", True),
    Column("prob", "The model's own probability, before any sampling setting", True),
    Column("rank", "Among all tokens of the vocabulary; 1 is the most likely", True),
    Column("surprisal", "-log prob of the chosen token, in nats", True),
    Column("entropy", "Of the whole next-token distribution, in nats", True),
    Column("margin", "Probability of the likeliest token less the next one's", True),
)


def steps_table(left: Step | None, right: Step | None) -> Json:
    """Two steps in numbers, a row each; a side that has no step here has dashes."""
    rows = [("left", *_numbers(left)), ("right", *_numbers(right))]
    return table_data("Both steps in numbers", STEPS, rows, name="two-steps")


def _numbers(step: Step | None) -> tuple[str, ...]:
    if step is None:
        return ("–",) * (len(STEPS) - 1)
    return (
        shorten(visible(step.token)),
        str(step.step_index),
        format_number(step.prob, 3),
        f"{step.rank:,}",
        format_number(step.surprisal, 2),
        format_number(step.entropy, 2),
        format_number(step.margin, 3),
    )


def _settings(message: Message) -> dict[str, str]:
    generation, capture = message.generation, message.capture

    def of(record: object, name: str, nothing: str = "–") -> str:
        value: Any = getattr(record, name, None)
        return (
            nothing if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"
        )

    sampled = generation is not None and generation.do_sample
    speed = message.tokens / message.seconds if message.seconds else math.nan
    return {
        "model": message.model_id or "–",
        "dtype": of(capture, "dtype"),
        "quantization": of(capture, "quantization", "none"),
        "device": of(capture, "device"),
        "decoding": "–" if generation is None else "sampled" if sampled else "greedy",
        "temperature": of(generation, "temperature") if sampled else "–",
        "top-k": of(generation, "top_k") if sampled else "–",
        "top-p": of(generation, "top_p") if sampled else "–",
        "repetition penalty": of(generation, "repetition_penalty"),
        "seed": of(generation, "seed") if sampled else "–",
        "prompt tokens": of(message, "prompt_len"),
        "tokens": f"{message.tokens:,}",
        "tokens/s": format_number(speed, 1),
        "status": str(message.status),
    }
