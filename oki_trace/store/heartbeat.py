"""Signs of life: how a process is judged that cannot be looked at from here.

A process on this machine is asked for directly (``owner.is_dead``). One on
another machine can only be a user of a PostgreSQL store: while it generates, it
writes the server's time beside its reply every BEAT_SECONDS, and is taken for
gone once it has been silent for SILENCE_SECONDS. Both moments come from the
server's clock, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, func, type_coerce, update
from sqlalchemy.exc import SQLAlchemyError

from oki_trace.records import Status
from oki_trace.store.owner import Owner, is_dead, this_process
from oki_trace.store.schema.column_types import UtcTime
from oki_trace.store.schema.models import Message, Worker

BEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0

log = logging.getLogger(__name__)

# The store's own clock. SQLite's counts whole seconds.
CLOCK: ColumnElement[dt.datetime] = type_coerce(func.now(), UtcTime()).label("clock")
# What is_gone() has to be given of a message.
LIFE: tuple[ColumnElement[Any], ...] = (
    Message.__table__.c.owner,
    Message.__table__.c.seen_at,
    CLOCK,
)


def is_gone(row: Row[Any]) -> bool:
    """Whether the process named by ``row.owner`` has ended; ``row`` has the columns of LIFE."""
    return row.owner is not None and ended(row.owner, row.seen_at, row.clock)


def ended(owner: str, seen_at: dt.datetime | None, clock: dt.datetime) -> bool:
    """Whether ``owner`` is dead here, or has been silent elsewhere for too long."""
    known = Owner.parse(owner)
    if known.pid == 0 or known.host == this_process().host:
        return is_dead(owner)
    return seen_at is not None and clock - seen_at > dt.timedelta(seconds=SILENCE_SECONDS)


class Heartbeat:
    """The thread that gives this process's signs of life. Does nothing on SQLite.

    A beat does not count the store's version up: it is news to nobody.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None and self._engine.dialect.name == "postgresql":
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, and wait for a beat under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self) -> None:
        """Write one sign of life. Raises SQLAlchemyError."""
        me = str(this_process())
        with self._engine.begin() as connection:
            connection.execute(
                update(Message)
                .where(Message.status == Status.RUNNING.value, Message.owner == me)
                .values(seen_at=func.now())
            )
            connection.execute(update(Worker).where(Worker.owner == me).values(heartbeat=CLOCK))

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self.beat()
            except SQLAlchemyError as error:
                # The next one may get through; the reply itself meets the same
                # server and fails with a reason if that is gone for good.
                log.warning("no sign of life could be written (%s)", type(error).__name__)
