"""Adds readings by installed lenses to the steps of a reply that has ended, and removes them.

A reading is written in one transaction, in place of an earlier one of the same lens. The
Logit Lens is a part of the recorded step, which its digest covers, and stays as it is.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, select, update

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import Lens, require_lens_name
from oki_trace.store.schema.models import LensEntry, LensLayer, Message, Step
from oki_trace.store.writing import lifecycle
from oki_trace.store.writing.rows import StepRows
from oki_trace.store.writing.writer import TraceWriter


class ReadingWriter:
    """Writes readings to the store of ``writer``."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        # Made with the first connection, whose dialect it needs.
        self._rows: StepRows | None = None

    def add(self, step_id: int, lens: Lens) -> None:
        """Write the reading of a stored step.

        Raises UsageError for a name that no installed lens has, NotFound for a step that is
        gone, StoreError while its reply is generated.
        """
        require_lens_name(lens.name)
        with self._writer.write() as connection:
            query = select(Step.message_id).where(Step.id == step_id)
            message_id = connection.execute(query).scalar()
            if message_id is None:
                raise NotFound(f"There is no step with the id {step_id}: it has been deleted.")
            _count_change(connection, message_id)
            if self._rows is None:
                self._rows = StepRows(connection.dialect)
            for table in (LensEntry, LensLayer):
                own = (table.step_id == step_id, table.lens == lens.name)
                connection.execute(delete(table).where(*own))
            self._rows.insert_lenses(connection, [(step_id, lens, None)])

    def remove(self, message_id: int, name: str) -> None:
        """Delete the readings of a reply by one lens; one that has none is left as it is.

        Raises NotFound, and otherwise as ``add``.
        """
        require_lens_name(name)
        with self._writer.write() as connection:
            steps = select(Step.id).where(Step.message_id == message_id)
            rows = 0
            for table in (LensEntry, LensLayer):
                own = (table.step_id.in_(steps), table.lens == name)
                rows += connection.execute(delete(table).where(*own)).rowcount
            if rows:
                _count_change(connection, message_id)


def _count_change(connection: Connection, message_id: int) -> None:
    """Count a change of a reply's readings, by which the query cache notices it."""
    if lifecycle.state_of(connection, message_id)[0].is_live:
        raise StoreError(
            f"Message {message_id} is being generated: apply the lens when it has ended."
        )
    connection.execute(
        update(Message).where(Message.id == message_id).values(readings=Message.readings + 1)
    )
