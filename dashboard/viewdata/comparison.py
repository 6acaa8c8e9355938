"""The data of the Compare page, two replies side by side: pure functions, no Streamlit.

Replies are aligned by their tokens. The distance of two steps is the total variation, from 0 (the
same) to 1 (nothing in common), as ``analysis.step_distance`` measures it: exact where both kept
their full logits, else the least and the most that it can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from dashboard.viewdata.replies import MEANINGS, token_data, token_texts, token_tooltip
from dashboard.viewdata.wording import (
    Column,
    Json,
    counted,
    format_number,
    shorten,
    table_data,
)
from oki_trace.analysis.distance import FULL, Distance
from oki_trace.analysis.reply_alignment import Alignment
from oki_trace.records import Message, Step, StepSummary
from oki_trace.sanitize import inert, visible

# Longer replies are aligned step by step after they diverge: finding tokens that both share later
# takes time that grows with the square of the length.
ALIGNED_TOKENS = 2000
# Step 0 of both replies stand beside each other.
SIDE_BY_SIDE = Alignment(0, 0, (), True)
Steps = Sequence[StepSummary]
Distances = Sequence[Distance | None]


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair of steps, one of each reply; None where a reply has no step."""

    left: int | None
    right: int | None
    same: bool


def align(left: Steps, right: Steps, alignment: Alignment = SIDE_BY_SIDE) -> list[Pair]:
    """The steps of both, in order, with equal tokens beside each other where possible.

    Tokens are equal when their bytes are, so that replies of two models can be aligned. Steps whose
    tokens are in the prompt of the other, a branch, come first and have none beside them.
    """
    left_from, right_from = alignment.first_from, alignment.second_from
    pairs = [
        Pair(i, None, same) if left_from else Pair(None, i, same)
        for i, same in enumerate(alignment.kept_same)
    ]
    for pair in _align(left[left_from:], right[right_from:]):
        one = None if pair.left is None else pair.left + left_from
        two = None if pair.right is None else pair.right + right_from
        pairs.append(Pair(one, two, pair.same))
    return pairs


def _align(left: Steps, right: Steps) -> list[Pair]:
    one, two = ([s.token_bytes for s in steps] for steps in (left, right))
    shared = 0
    while shared < min(len(one), len(two)) and one[shared] == two[shared]:
        shared += 1
    pairs = [Pair(i, i, True) for i in range(shared)]
    rest = one[shared:], two[shared:]
    blocks: list[tuple[str, int, int, int, int]]
    if max(len(one), len(two)) > ALIGNED_TOKENS:
        blocks = [
            ("equal" if x == y else "replace", i, i + 1, i, i + 1)
            for i, (x, y) in enumerate(zip(*rest, strict=False))
        ]
        blocks.append(("replace", len(blocks), len(rest[0]), len(blocks), len(rest[1])))
    else:
        blocks = [*SequenceMatcher(None, *rest, autojunk=False).get_opcodes()]
    for kind, a, a_end, b, b_end in blocks:
        for k in range(max(a_end - a, b_end - b)):
            left_step = shared + a + k if a + k < a_end else None
            right_step = shared + b + k if b + k < b_end else None
            pairs.append(Pair(left_step, right_step, kind == "equal"))
    return pairs


def divergence(pairs: Sequence[Pair]) -> int | None:
    """The number of the first pair that differs; None when all are the same."""
    return next((n for n, pair in enumerate(pairs) if not pair.same), None)


def verdict(pairs: Sequence[Pair]) -> str:
    """How much the two replies have in common, in a sentence."""
    first = divergence(pairs)
    if first is None:
        return f"Both replies have the same {counted(len(pairs), 'token')}."
    same = sum(pair.same for pair in pairs)
    return f"The replies diverge at step {first:,}; {same:,} of {len(pairs):,} pairs match."


def first_shown(pairs: Sequence[Pair]) -> int | None:
    """The pair that is shown first: where the replies diverge, or the nearest with both steps.

    A later pair comes before an earlier one. None when no pair has both steps.
    """
    at = divergence(pairs) or 0
    both = [n for n, pair in enumerate(pairs) if pair.left is not None and pair.right is not None]
    return next((n for n in both if n >= at), both[-1] if both else None)


def is_exact(distances: Distances) -> bool:
    """Whether every known distance comes from the full logits."""
    known = [distance for distance in distances if distance is not None]
    return bool(known) and all(distance.basis == FULL for distance in known)


def in_words(distance: Distance | None) -> str:
    """The total variation, as a number or a range."""
    if distance is None:
        return "not known"
    if distance.tv_most - distance.tv < 5e-4:
        return format_number(distance.tv, 3)
    return f"{format_number(distance.tv, 3)} to {format_number(distance.tv_most, 3)}"


# -------------------------------------------------------------------- elements and charts


def replies_data(
    messages: tuple[Message, Message],
    steps: tuple[Steps, Steps],
    pairs: Sequence[Pair],
    distances: Distances,
    chosen: int | None = None,
    kept: tuple[str, str] = ("", ""),
) -> Json:
    """The data of ``components/compare.js``: both replies, token by token.

    ``chosen``: the number of the pair that is shown below. ``kept``: the text at the end of
    each reply's prompt that is its beginning.
    """
    first = divergence(pairs)
    sides = []
    for message, of_side, side, text_kept in zip(
        messages, steps, ("left", "right"), kept, strict=True
    ):
        texts = token_texts(of_side)
        tokens: list[Json] = []
        for number, (pair, distance) in enumerate(zip(pairs, distances, strict=True)):
            index = getattr(pair, side)
            if index is None:
                continue
            step, text = of_side[index], texts[index]
            tokens.append(
                {
                    **token_data(step, text),
                    "pair": number,
                    "same": pair.same,
                    "first": number == first,
                    "step": index,
                    "title": f"{token_tooltip(step)}\ntotal variation {in_words(distance)}"
                    + ("\nthe replies diverge here" if number == first else ""),
                }
            )
        sides.append(
            {
                "tokens": tokens,
                "conversation": message.conversation_id,
                "message": message.id,
                "kept": inert(text_kept),
                "empty": "This reply has no tokens." if not tokens else "",
            }
        )
    return {"sides": sides, "chosen": chosen, "rows": sheet(pairs, distances, *steps)}


def sheet(
    pairs: Sequence[Pair], distances: Distances, left: Steps, right: Steps
) -> list[list[Any]]:
    """Both replies as rows of a CSV: the tokens of each pair, and the total variation."""
    table: list[list[Any]] = [
        [
            *("pair", "left_step", "left_token", "right_step", "right_token", "same"),
            *("least_total_variation", "most_total_variation"),
        ]
    ]
    for number, (pair, distance) in enumerate(zip(pairs, distances, strict=True)):
        tokens = [
            None if at is None else visible(steps[at].token)
            for at, steps in ((pair.left, left), (pair.right, right))
        ]
        bounds = [None, None] if distance is None else [distance.tv, distance.tv_most]
        table.append([number, pair.left, tokens[0], pair.right, tokens[1], int(pair.same), *bounds])
    return table


def rows(pairs: Sequence[Pair], distances: Distances, left: Steps, right: Steps) -> list[Json]:
    """A row for each pair whose distance is known, for the chart."""
    return [
        {
            "pair": number,
            "low": distance.tv,
            "high": distance.tv_most,
            "left": shorten(visible(left[pair.left].token)),
            "right": shorten(visible(right[pair.right].token)),
            "token": "the same token" if pair.same else "different tokens",
        }
        for number, (pair, distance) in enumerate(zip(pairs, distances, strict=True))
        if distance is not None and pair.left is not None and pair.right is not None
    ]


SIDES = (Column(""), Column("left"), Column("right"))


def settings(left: Message, right: Message) -> Json:
    """The settings of each reply as a table; rows that differ are marked."""
    one, two = _settings(left), _settings(right)
    rows = [(name, one[name], two[name]) for name in one]
    differ = [number for number, (_, a, b) in enumerate(rows) if a != b]
    return table_data("Settings", SIDES, rows, name="settings", marked=differ)


STEPS = (
    Column(""),
    Column("token"),
    Column("step", "In its own reply, counted from 0", True),
    *(
        Column(name, MEANINGS[name], True)
        for name in ("prob", "rank", "surprisal", "entropy", "margin")
    ),
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

    def of(record: object, name: str, default: str = "–") -> str:
        value: Any = getattr(record, name, None)
        return default if value is None else f"{value:g}" if type(value) is float else str(value)

    sampled = generation if generation is not None and generation.do_sample else None
    speed = message.tokens / message.seconds if message.seconds and message.tokens else math.nan
    decoding = "–" if generation is None else "sampled" if sampled else "greedy"
    return {
        "model": message.model_id or "–",
        "dtype": of(capture, "dtype"),
        "quantization": of(capture, "quantization", "none"),
        "device": of(capture, "device"),
        "decoding": "scored text" if message.is_score else decoding,
        "temperature": of(sampled, "temperature"),
        "top-k": of(sampled, "top_k"),
        "top-p": of(sampled, "top_p"),
        "repetition penalty": of(generation, "repetition_penalty"),
        "seed": of(sampled, "seed"),
        "prompt tokens": of(message, "prompt_len"),
        "tokens": f"{message.tokens:,}",
        "tokens/s": format_number(speed, 1),
        "status": str(message.status),
    }
