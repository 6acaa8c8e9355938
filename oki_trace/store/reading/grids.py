"""Many steps of one reply at once, as arrays: one query, no record a step.

For pictures of a whole reply. What hangs on a step is clustered by step, so
this reads one range of each table and nothing else; no tensor is touched.
"""

from __future__ import annotations

import numpy as np
from sqlalchemy import ColumnElement, Connection, select

from oki_trace.records import AttentionPoints, LensGrid
from oki_trace.store.schema import models


def within(message_id: int, first: int, end: int | None) -> list[ColumnElement[bool]]:
    """The condition: a step of this reply, from ``first`` up to but not ``end``."""
    table = models.Step
    upper = [] if end is None else [table.step_index < end]
    return [table.message_id == message_id, table.step_index >= first, *upper]


def lens(connection: Connection, message_id: int, first: int, end: int | None) -> LensGrid:
    """See ``TraceReader.lens_grid``."""
    step, layer, entry = models.Step, models.LensLayer, models.LensEntry
    rows = connection.execute(
        select(
            step.step_index,
            entry.token_id,
            entry.token,
            entry.prob,
            layer.entropy,
            layer.chosen_rank,
            layer.chosen_prob,
            layer.kl,
        )
        .join(layer, layer.step_id == step.id)
        .join(
            entry,
            (entry.step_id == layer.step_id) & (entry.layer == layer.layer) & (entry.rank == 1),
        )
        .where(*within(message_id, first, end))
        .order_by(step.step_index, layer.layer)
    ).all()
    columns = list(zip(*rows, strict=True)) or [()] * 8
    steps = np.unique(np.array(columns[0], dtype=np.int64))
    shape = (len(steps), len(rows) // max(len(steps), 1))
    # Thousands of cells hold a few hundred words.
    words = {token: number for number, token in enumerate(dict.fromkeys(columns[2]))}

    def floats(column: int) -> np.ndarray:
        return np.array(columns[column], dtype=np.float32).reshape(shape)

    def ints(column: int) -> np.ndarray:
        return np.array(columns[column], dtype=np.int64).reshape(shape)

    return LensGrid(
        step_index=steps,
        tokens=tuple(words),
        top=np.array([words[token] for token in columns[2]], dtype=np.int64).reshape(shape),
        top_id=ints(1),
        top_prob=floats(3),
        entropy=floats(4),
        chosen_rank=ints(5),
        chosen_prob=floats(6),
        kl=floats(7),
    )


def attention(
    connection: Connection, message_id: int, layer: int, first: int, end: int | None
) -> AttentionPoints:
    """See ``TraceReader.attention_points``."""
    step, entry = models.Step, models.AttentionEntry
    rows = connection.execute(
        select(step.step_index, entry.position, entry.weight)
        .join(entry, entry.step_id == step.id)
        .where(*within(message_id, first, end), entry.layer == layer)
        .order_by(step.step_index, entry.rank)
    ).all()
    columns = list(zip(*rows, strict=True)) or [()] * 3
    return AttentionPoints(
        step_index=np.array(columns[0], dtype=np.int64),
        position=np.array(columns[1], dtype=np.int64),
        weight=np.array(columns[2], dtype=np.float32),
    )
