"""How much room a store takes, and for what.

Measured without reading a tensor: SQLite tells its pages, PostgreSQL its
relations, and each step knows what its own tensors take.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sqlalchemy import DDL, Connection, column, func, select, table

from oki_trace.store.schema import models

# PostgreSQL: a row's header and line pointer, and about as much for its entry in the key.
_BESIDE_A_ROW = 24 + 4 + 28

_PG_CLASS = table("pg_class", column("oid"), column("relname"), column("reltuples"))
_PG_STATS = table("pg_stats", column("tablename"), column("avg_width"))


class Sizes(NamedTuple):
    """In bytes: all on disk; of it the log, and free room; and the data without tensors."""

    disk: int
    log: int
    free: int
    rows: int
    tensors: int
    tensor_steps: int


def measure(connection: Connection, path: Path | None) -> Sizes:
    """The sizes of the store; ``path`` is its file, None on PostgreSQL."""
    size = models.Step.tensor_bytes
    tensors, steps = connection.execute(
        select(func.coalesce(func.sum(size), 0), func.count()).where(size > 0)
    ).one()
    tensors = int(tensors)
    if path is None:
        disk, rows = _postgresql(connection)
        return Sizes(disk, 0, 0, rows, tensors, steps)
    page = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    log = _length(path.with_name(path.name + "-wal"))
    return Sizes(
        disk=_length(path) + log,
        log=log,
        free=free * page,
        rows=max(0, (pages - free) * page - tensors),
        tensors=tensors,
        tensor_steps=steps,
    )


def refresh_statistics(connection: Connection) -> None:
    """After much was deleted: PostgreSQL counts again how many rows are in use."""
    if connection.dialect.name == "postgresql":
        for name in models.Base.metadata.tables:
            quoted = connection.dialect.identifier_preparer.quote(name)
            # A name takes no bound parameter, and SQLAlchemy leaves DDL untyped.
            analyze: DDL = DDL("ANALYZE %(table)s", {"table": quoted})  # type: ignore[no-untyped-call]
            connection.execute(analyze)


def _length(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _postgresql(connection: Connection) -> tuple[int, int]:
    """(all our relations, an estimate of the rows in use without the tensors)."""
    disk = rows = 0
    for name in models.Base.metadata.tables:
        relation = int(
            connection.execute(select(func.pg_total_relation_size(name))).scalar_one() or 0
        )
        disk += relation
        if name == models.Tensor.__tablename__:
            continue
        # Deleted rows keep their room, so a relation's size says nothing of
        # what is in use; the planner's statistics do, once there are any.
        count = connection.execute(
            select(_PG_CLASS.c.reltuples).where(_PG_CLASS.c.relname == name)
        ).scalar_one()
        width = connection.execute(
            select(func.sum(_PG_STATS.c.avg_width)).where(_PG_STATS.c.tablename == name)
        ).scalar()
        if width is None or count < 0:
            rows += relation
        else:
            rows += min(relation, int(count * (width + _BESIDE_A_ROW)))
    return disk, rows
