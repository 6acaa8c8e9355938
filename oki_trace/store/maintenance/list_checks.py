"""Checks a step's lists: ranks have no gap, and every row belongs to a list.

A record is built from rows in their order, so it does not show a wrong number that
does not change the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import and_, func, select

from oki_trace.records import LOGIT
from oki_trace.store.reading.reader import Snapshot
from oki_trace.store.schema import models

# The lists of ranked rows: the table, and the columns that separate the lists of a step.
_RANKED: tuple[tuple[str, type[models.Base], tuple[str, ...]], ...] = (
    ("candidates", models.TopkEntry, ()),
    ("attention", models.AttentionEntry, ("layer",)),
    ("lens", models.LensEntry, ("layer", "lens")),
    ("router", models.RouterEntry, ("layer",)),
)
_LAYERED: tuple[tuple[str, type[models.Base], type[models.Base], tuple[str, ...]], ...] = (
    ("attention", models.AttentionEntry, models.AttentionLayer, ("layer",)),
    ("lens", models.LensEntry, models.LensLayer, ("layer", "lens")),
)


def broken_lists(instant: Snapshot, step_ids: list[int]) -> dict[int, list[str]]:
    """A sentence for each problem in the lists of these steps, by step id."""
    broken: dict[int, list[str]] = {}
    for check in (_broken_ranks, _strays):
        for step_id, problem in check(instant, step_ids):
            broken.setdefault(step_id, []).append(problem)
    return broken


def _broken_ranks(instant: Snapshot, step_ids: list[int]) -> Iterator[tuple[int, str]]:
    """Lists that are not ranked 1, 2, 3 … without a gap."""
    for name, table, separators in _RANKED:
        columns = table.__table__.c
        lists = [columns[column] for column in ("step_id", *separators)]
        for row in instant.rows(
            select(*lists, func.count(), func.min(columns.rank), func.max(columns.rank))
            .where(columns.step_id.in_(step_ids))
            .group_by(*lists)
        ):
            count, lowest, highest = row[-3:]
            if (lowest, highest) != (1, count):
                ranks = f"ranks {lowest} to {highest}, {count} in all"
                yield row[0], f"the {name} rows{_place(row[1:-3])} have {ranks}"


def _strays(instant: Snapshot, step_ids: list[int]) -> Iterator[tuple[int, str]]:
    """Entries of a layer that the step does not have."""
    for name, entries, layers, separators in _LAYERED:
        own: Any = entries.__table__.c
        of: Any = layers.__table__.c
        same = [of[column] == own[column] for column in ("step_id", *separators)]
        for row in instant.rows(
            select(own.step_id, *(own[column] for column in separators))
            .distinct()
            .outerjoin(layers, and_(*same))
            .where(own.step_id.in_(step_ids), of.layer.is_(None))
        ):
            yield row[0], f"there are {name} rows{_place(row[1:])}, which it does not have"


def _place(separators: Sequence[Any]) -> str:
    """The layer of a list, and its lens where it is not the Logit Lens."""
    layer, lens = (*separators, None, None)[:2]
    of_lens = "" if lens in (None, LOGIT) else f" of the lens {lens}"
    return "" if layer is None else f" of layer {layer}{of_lens}"
