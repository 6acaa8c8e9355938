"""Reads the state of a whole store: its version, its size, its replies and its worker.

Sizes are measured without reading a tensor: SQLite knows its pages, PostgreSQL its
relations, and each step the size of its tensors.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, column, func, select, table

from oki_trace.records import ReplySize, Status, StoreInfo, WorkerState
from oki_trace.store.liveness import CLOCK, has_ended, running_replies, status_of
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.schema import identity, models
from oki_trace.store.schema.models import Message, Step, StoreState, Worker

# PostgreSQL: a row's header and line pointer, and about as much for its entry in the key.
_ROW_OVERHEAD = 24 + 4 + 28

_PG_CLASS = table("pg_class", column("oid"), column("relname"), column("reltuples"))
_PG_STATS = table("pg_stats", column("tablename"), column("avg_width"))


class StoreReads(ReadConnection):
    """The read methods about the store as a whole."""

    def version(self) -> int:
        """A number that grows whenever anything in the store changes."""
        return int(self.scalar(select(StoreState.version)))

    def stamp(self) -> str:
        """The version, and an identity that another store in the same place does not have."""
        with self._read() as connection:
            version = connection.execute(select(StoreState.version)).scalar_one()
            latest = connection.execute(select(func.max(Message.created_at))).scalar()
        inode = self.file.stat().st_ino if self.file else 0
        return f"{version} {inode} {latest}"

    def info(self) -> StoreInfo:
        """Totals over the whole store; reads no tensor."""
        size = Step.tensor_bytes
        tensors = select(func.coalesce(func.sum(size), 0), func.count()).where(size > 0)
        with self._read() as connection:
            conversations, messages, steps = (
                connection.execute(select(func.count()).select_from(model)).scalar_one()
                for model in (models.Conversation, Message, Step)
            )
            tensor_bytes, tensor_steps = connection.execute(tensors).one()
            if self.file is None:
                disk, rows = _measure_postgresql(connection)
                log = free = 0
            else:
                data, free = _measure_sqlite(connection)
                log = _file_size(self.file.with_name(self.file.name + "-wal"))
                disk, rows = _file_size(self.file) + log, max(0, data - int(tensor_bytes))
        return StoreInfo(
            url=self._store,
            schema=identity.HISTORY[-1],
            bytes=disk,
            conversations=conversations,
            messages=messages,
            steps=steps,
            tensor_bytes=int(tensor_bytes),
            tensor_steps=tensor_steps,
            row_bytes=rows,
            log_bytes=log,
            free_bytes=free,
        )

    def reply_sizes(self) -> list[ReplySize]:
        """The size of each reply that has tokens, the oldest first."""
        query = (
            select(Message.created_at, func.count(), func.sum(Step.tensor_bytes))
            .join(Step, Step.message_id == Message.id)
            .group_by(Message.id)
            .order_by(Message.created_at, Message.id)
        )
        return [ReplySize(time, tokens, int(size)) for time, tokens, size in self.rows(query)]

    def reply_statuses(self) -> dict[Status, int]:
        """How many replies have each status; see ``liveness.effective_status``."""
        of_replies = Message.role == "assistant"
        query = select(Message.status, func.count()).where(of_replies).group_by(Message.status)
        with self._read() as connection:
            counts = dict.fromkeys(Status, 0)
            for status, count in connection.execute(query):
                counts[status_of(status)] += count
            dead = len(running_replies(connection, of_replies).dead)
        counts[Status.RUNNING] -= dead
        counts[Status.INTERRUPTED] += dead
        return {status: count for status, count in counts.items() if count}

    def worker(self) -> WorkerState | None:
        """The worker with the latest heartbeat, "gone" if its process is dead; None: no worker."""
        query = select(Worker.__table__, CLOCK).order_by(
            Worker.heartbeat_at.desc(), Worker.id.desc()
        )
        rows = self.rows(query.limit(1))
        if not rows:
            return None
        (row,) = rows
        gone = has_ended(row.owner, row.heartbeat_at, row.clock)
        return WorkerState(
            state="gone" if gone else row.state,
            model_id=None if gone else row.model_id,
            detail=row.detail,
            progress=None if gone else row.progress,
            pid=row.pid,
            updated_at=row.heartbeat_at,
        )


def _file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _measure_sqlite(connection: Connection) -> tuple[int, int]:
    """(bytes of the pages in use, bytes of the free pages)."""
    page_size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    return (pages - free) * page_size, free * page_size


def _measure_postgresql(connection: Connection) -> tuple[int, int]:
    """(bytes of all our relations, estimated bytes of the rows in use without the tensors)."""
    disk = rows = 0
    for name in models.Base.metadata.tables:
        relation = int(
            connection.execute(select(func.pg_total_relation_size(name))).scalar_one() or 0
        )
        disk += relation
        if name == models.Tensor.__tablename__:
            continue
        # Deleted rows keep their space, so the size of a relation says nothing about the rows
        # in use; the statistics of the planner do, once it has collected any.
        count = connection.execute(
            select(_PG_CLASS.c.reltuples).where(_PG_CLASS.c.relname == name)
        ).scalar_one()
        width = connection.execute(
            select(func.sum(_PG_STATS.c.avg_width)).where(_PG_STATS.c.tablename == name)
        ).scalar()
        if width is None or count < 0:
            rows += relation
        else:
            rows += min(relation, int(count * (width + _ROW_OVERHEAD)))
    return disk, rows
