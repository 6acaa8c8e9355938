"""Reads which lenses have read a reply, and which of its steps a lens could still read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import exists, select

from oki_trace.records import LOGIT
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.schema.models import LensLayer, Step, Tensor

_STEPS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class UnreadStep:
    """A step that has hidden states and no reading by a lens. ``step_index``: -1 if given."""

    id: int
    step_index: int
    position: int
    token_id: int


class LensReads(ReadConnection):
    """The read methods about the lenses of a reply."""

    def lens_names(self, message_id: int) -> tuple[str, ...]:
        """The lenses by which any step of a reply was read: the Logit Lens, then by name."""
        steps = select(Step.id).where(Step.message_id == message_id)
        query = select(LensLayer.lens).distinct().where(LensLayer.step_id.in_(steps))
        return tuple(sorted(self.scalars(query), key=lambda name: (name != LOGIT, name)))

    def unread_steps(self, message_id: int, lens: str) -> Iterator[UnreadStep]:
        """The steps of a reply that have hidden states and no reading by ``lens``, by id.

        A few hundred are in memory at a time, each batch from one snapshot, so readings can
        be written meanwhile.
        """
        last = -1
        has_states = exists().where(Tensor.step_id == Step.id, Tensor.name == "hidden_states")
        is_read = exists().where(LensLayer.step_id == Step.id, LensLayer.lens == lens)
        while True:
            query = (
                select(Step.id, Step.step_index, Step.position, Step.token_id)
                .where(Step.message_id == message_id, Step.id > last, has_states, ~is_read)
                .order_by(Step.id)
                .limit(_STEPS_AT_ONCE)
            )
            rows = self.rows(query)
            for row in rows:
                index = -1 if row.step_index is None else row.step_index
                yield UnreadStep(row.id, index, row.position, row.token_id)
            if len(rows) < _STEPS_AT_ONCE:
                return
            last = rows[-1].id
