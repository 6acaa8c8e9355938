"""Decides whether the process that runs a reply or a worker is alive.

A process is named ``host:pid:start``; the start time distinguishes it from a later
process with the same number. On this machine, the operating system says whether it is
alive. Processes on other machines share only a PostgreSQL store: a process writes the
server's time to its reply every BEAT_SECONDS, and counts as dead after SILENCE_SECONDS
without a heartbeat. Both times come from the server's clock, so the clocks of the
machines need not agree.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import socket
import threading
from typing import Any, NamedTuple

import psutil
from sqlalchemy import ColumnElement, Connection, Engine, Row, func, select, type_coerce, update
from sqlalchemy.exc import SQLAlchemyError

from oki_trace.records import Status
from oki_trace.store.schema.column_types import UtcTime
from oki_trace.store.schema.models import Message, Worker

BEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0

log = logging.getLogger(__name__)


class Owner(NamedTuple):
    """A process, by host, number and start time."""

    host: str
    pid: int
    start: str

    def __str__(self) -> str:
        return ":".join((self.host, str(self.pid), self.start))

    @classmethod
    def parse(cls, name: str) -> Owner:
        """Read what ``str()`` wrote. A host name holds no colon."""
        host, pid, start = [*name.split(":"), "", ""][:3]
        # A damaged name gets the number 0, which no process has.
        return cls(host, int(pid) if pid.isdecimal() and len(pid) < 10 else 0, start)


def this_process() -> Owner:
    """The running process; not cached, because a fork is another process."""
    pid = os.getpid()
    return Owner(_host(), pid, _start_of(pid))


def is_dead(name: str) -> bool:
    """Whether the process named ``name`` is known to have ended; False on another host."""
    owner = Owner.parse(name)
    if owner.pid == 0:
        return True
    if owner.host != _host():
        return False
    try:
        if owner.start not in ("", _start_of(owner.pid)):
            return True
        return psutil.Process(owner.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return not _is_hidden(owner.pid)
    except psutil.AccessDenied:
        return False


def _host() -> str:
    return socket.gethostname().replace(":", "-")


def _start_of(pid: int) -> str:
    """When ``pid`` started, in hundredths of a second; no change of the clock moves it.

    Raises psutil.Error.
    """
    # Linux counts from boot, and psutil adds the time of the boot, which moves with the clock.
    # It is read first because older versions of psutil reuse the time that was read last.
    boot = psutil.boot_time() if psutil.LINUX else 0.0
    return str(round(100 * (psutil.Process(pid).create_time() - boot)))


def _is_hidden(pid: int) -> bool:
    """Whether ``pid`` exists although /proc does not show it (mount option ``hidepid``)."""
    if not psutil.POSIX:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True


# The store's own clock. SQLite's counts whole seconds.
CLOCK: ColumnElement[dt.datetime] = type_coerce(func.now(), UtcTime()).label("clock")
# The columns that effective_status() needs.
LIFE: tuple[ColumnElement[Any], ...] = (
    Message.__table__.c.status,
    Message.__table__.c.owner,
    Message.__table__.c.heartbeat_at,
    CLOCK,
)


def status_of(text: object) -> Status:
    """The status of a stored value; an unknown value counts as failed."""
    try:
        return Status(str(text))
    except ValueError:
        return Status.FAILED


def effective_status(row: Row[Any]) -> Status:
    """The status of a message: the stored one, but a dead process runs nothing.

    A reply stored as running is interrupted once the process that generates it is dead.
    ``row`` has the columns of LIFE.
    """
    status = status_of(row.status)
    if status is Status.RUNNING and row.owner is not None:
        return Status.INTERRUPTED if has_ended(row.owner, row.heartbeat_at, row.clock) else status
    return status


def has_ended(owner: str, heartbeat_at: dt.datetime | None, clock: dt.datetime) -> bool:
    """Whether ``owner`` is dead on this machine, or has been silent for too long elsewhere."""
    known = Owner.parse(owner)
    if known.pid == 0 or known.host == _host():
        return is_dead(owner)
    return heartbeat_at is not None and clock - heartbeat_at > dt.timedelta(seconds=SILENCE_SECONDS)


class RunningReplies(NamedTuple):
    """Replies stored as running, by the life of their process; rows are ordered by id.

    Each row has ``id``, ``conversation_id`` and ``owner``.
    """

    alive: list[Row[Any]]
    dead: list[Row[Any]]


def running_replies(
    connection: Connection, *conditions: ColumnElement[bool], lock: bool = False
) -> RunningReplies:
    """The replies stored as running that meet the ``conditions``.

    ``lock``: on PostgreSQL nobody can claim or end one of them before the transaction ends.
    """
    query = (
        select(Message.id, Message.conversation_id, *LIFE)
        .where(Message.status == Status.RUNNING.value, *conditions)
        .order_by(Message.id)
    )
    rows = connection.execute(query.with_for_update() if lock else query).all()
    found = RunningReplies([], [])
    for row in rows:
        (found.alive if effective_status(row) is Status.RUNNING else found.dead).append(row)
    return found


class Heartbeat:
    """The thread that writes this process's heartbeat. Does nothing on SQLite.

    A heartbeat does not increment the store's version: no viewer needs to read it.
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
        """End, and wait for a heartbeat under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self) -> None:
        """Write one heartbeat. Raises SQLAlchemyError."""
        me = str(this_process())
        with self._engine.begin() as connection:
            connection.execute(
                update(Message)
                .where(Message.status == Status.RUNNING.value, Message.owner == me)
                .values(heartbeat_at=func.now())
            )
            connection.execute(update(Worker).where(Worker.owner == me).values(heartbeat_at=CLOCK))

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self.beat()
            except SQLAlchemyError as error:
                # The next one may succeed. If the server is gone for good, the reply
                # itself fails with the reason.
                log.warning("the heartbeat could not be written (%s)", type(error).__name__)
