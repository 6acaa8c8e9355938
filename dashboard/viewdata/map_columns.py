"""The columns of the reply map: the traced tokens of the prompt, then the reply's: pure functions.

Columns are numbered as everywhere in the explorer: step 0 is the reply's first token, -1
the last token of its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from dashboard.viewdata.wording import Json
from oki_trace.records import StepSummary
from oki_trace.sanitize import visible
from oki_trace.store.reading.prompt_steps import PromptStep


class MapColumn(NamedTuple):
    """A column: its ``number``, its step, and the message ``owner`` whose step it is."""

    number: int
    step: StepSummary
    owner: int

    @property
    def given(self) -> bool:
        """Whether the store addresses the step by its position."""
        return self.step.step_index < 0

    @property
    def address(self) -> int:
        """The step or the position by which the store addresses it."""
        return self.step.position if self.given else self.step.step_index


class Run(NamedTuple):
    """Columns that the store reads at once: the steps of ``owner`` from ``first`` up to ``end``.

    ``given``: by position. ``shift`` is the number of a column minus its address.
    """

    owner: int
    given: bool
    first: int
    end: int
    shift: int


def map_columns(
    message: int, prompt_len: int, prompt: Mapping[int, PromptStep], steps: Sequence[StepSummary]
) -> list[MapColumn]:
    """The columns of a reply: ``prompt`` has the traced tokens of its prompt, by position."""
    before = [
        MapColumn(at - prompt_len, one.step, one.message_id) for at, one in sorted(prompt.items())
    ]
    return [*before, *(MapColumn(s.step_index, s, message) for s in steps)]


def runs(columns: Sequence[MapColumn]) -> list[Run]:
    """The runs of consecutive ``columns``, in order."""

    def run(column: MapColumn) -> tuple[int, bool, int]:
        return column.owner, column.given, column.number - column.address

    found = []
    for (owner, given, shift), group in groupby(columns, key=run):
        own = list(group)
        found.append(Run(owner, given, own[0].address, own[-1].address + 1, shift))
    return found


def windows(columns: Sequence[MapColumn], size: int) -> list[tuple[int, int]]:
    """Windows of up to ``size`` columns, [first, end), one of them around the reply's start."""
    count = len(columns)
    if count <= size:
        return [(0, count)]
    seam = sum(column.number < 0 for column in columns)
    offset = (seam - size // 2) % size if 0 < seam < count else 0
    starts = sorted({0, *range(offset, count, size)})
    return list(zip(starts, [*starts[1:], count], strict=True))


def window_label(columns: Sequence[MapColumn], window: tuple[int, int]) -> str:
    """A window in words; positions are those of prompt tokens."""
    first, last = columns[window[0]], columns[window[1] - 1]
    if last.number < 0:
        return f"positions {first.step.position:,} to {last.step.position:,} of the prompt"
    if first.number < 0:
        return f"position {first.step.position:,} to step {last.number + 1:,}"
    count = columns[-1].number + 1
    return f"steps {first.number + 1:,} to {last.number + 1:,} of {count:,}"


def column_data(columns: Sequence[MapColumn]) -> Json:
    """The columns of a map as ``components/map.js`` draws them.

    ``reply`` is the column at which the reply starts, None if no prompt token is before it.
    """
    seam = sum(column.number < 0 for column in columns)
    return {
        "steps": [
            {
                "index": number,
                "label": step.position if number < 0 else number,
                "where": f"position {step.position}" if number < 0 else f"step {number}",
                "text": visible(step.token)[:40],
                "position": step.position,
                "surprisal": step.surprisal if math.isfinite(step.logprob) else None,
            }
            for number, step, _ in columns
        ],
        "reply": seam if 0 < seam < len(columns) else None,
    }
