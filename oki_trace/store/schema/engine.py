"""Every connection to a store is opened here, and every pragma has its reason.

Three engines for three jobs. The writer has one connection and takes the write
lock when a transaction begins. The reader cannot write, and a transaction of
it is one snapshot. The migrator leaves foreign keys unenforced, because a table
rebuilt by a migration would take its children with it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, QueuePool, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from oki_trace.errors import StoreError
from oki_trace.store.disk_reserve import Reserve
from oki_trace.store.reading.damage import document
from oki_trace.store.schema.files import Mode, connect_file, is_outdated, open_to_read
from oki_trace.store.schema.identity import file_of

# Scope: every connection.
_EVERY_CONNECTION = (
    # A store may come from someone else: what its schema says is not run.
    "PRAGMA trusted_schema = OFF",
)
# Scope: the connections that write traces.
_WRITER = (
    # In WAL mode NORMAL cannot corrupt the file when power fails, and saves
    # an fsync a step: what may be lost is the last moments.
    "PRAGMA synchronous = NORMAL",
    # Deleting a conversation deletes all that hangs on it.
    "PRAGMA foreign_keys = ON",
    # The inner pages of every tree stay in memory while a reply is written.
    "PRAGMA cache_size = -32768",
    # The log is given back to the disk after a reader held it open for long.
    "PRAGMA journal_size_limit = 67108864",
)
# 32 MB of 4 KB pages. The default of 4 MB is a checkpoint, with its fsyncs,
# every few tokens when each brings a few hundred KB of tensors. Larger pages
# would be chained less, but every small row written puts a whole page into
# the log.
_CHECKPOINT_RARELY = "PRAGMA wal_autocheckpoint = 8192"
# SQLite before 3.51.3 can damage a file when two connections checkpoint at
# the same instant, so all but one process never do. (The last connection to
# close checkpoints too, but holds the file exclusively while it does.)
_CHECKPOINT_NEVER = "PRAGMA wal_autocheckpoint = 0"
# Scope: the connections that read, of which there may be many.
_READER = (
    # Beside mode=ro, which keeps the file from being written: not even a
    # temporary table.
    "PRAGMA query_only = ON",
    "PRAGMA cache_size = -16384",
)

# Scope: every connection to a server. A role, a database or a server may have its own
# defaults for what the meaning of a value or of a statement depends on.
_POSTGRESQL = (
    "SET client_encoding = 'UTF8'",
    "SET datestyle = 'ISO, YMD'",
    "SET intervalstyle = 'postgres'",
    "SET timezone = 'UTC'",
    "SET standard_conforming_strings = on",
    "SET transform_null_equals = off",
    "SET bytea_output = 'hex'",
    # Every bit of a number; below 1 they are rounded.
    "SET extra_float_digits = 1",
    "SET default_transaction_isolation = 'read committed'",
    "SET default_transaction_read_only = off",
    # A step may wait for another writer, and a copy of a long conversation takes its time.
    "SET statement_timeout = 0",
    "SET lock_timeout = 0",
    "SET idle_in_transaction_session_timeout = 0",
)


def writer_engine(url: URL, *, checkpoint: bool) -> Engine:
    """One connection for all threads: a second writer waits, and never fails for it."""
    path = file_of(url)
    if path is None:
        return _postgresql(url)
    pragmas = (*_WRITER, _CHECKPOINT_RARELY if checkpoint else _CHECKPOINT_NEVER)
    engine = _sqlite(path, "rw", pragmas)
    # A transaction that begins by reading and then writes fails at once when
    # another process has written in between, however long the busy timeout.
    event.listen(engine, "begin", _begin_immediate)
    return engine


def set_checkpoint(connection: Connection) -> None:
    """Let this writer's connection do the checkpoints from now on."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_CHECKPOINT_RARELY)


def reader_engine(url: URL, reserve: Reserve | None = None) -> Engine:
    """Connections that cannot write; what one transaction reads was true at one instant.

    On a disk without a byte left they take the room of the ``reserve``.
    """
    path = file_of(url)
    if path is None:
        return _postgresql(
            url, isolation_level="REPEATABLE READ", execution_options={"postgresql_readonly": True}
        )
    kept = reserve or Reserve(path)
    engine = _sqlite(path, "ro", _READER, lambda: open_to_read(path, kept))
    event.listen(engine, "begin", _begin)

    def refuse_outdated(connection: DBAPIConnection, *_: object) -> None:
        if is_outdated(connection, path):
            raise DisconnectionError  # the pool opens another

    event.listen(engine, "checkout", refuse_outdated)
    return engine


def migration_engine(url: URL) -> Engine:
    """For migrations alone: tables may be rebuilt without losing their children."""
    path = file_of(url)
    if path is None:
        return _postgresql(url)
    engine = _sqlite(path, "rw", ("PRAGMA foreign_keys = OFF",))
    event.listen(engine, "begin", _begin_immediate)
    return engine


def autocommit_engine(url: URL) -> Engine:
    """PostgreSQL only, for what refuses to run inside a transaction."""
    return _postgresql(url, isolation_level="AUTOCOMMIT")


def _sqlite(
    path: Path,
    mode: Mode,
    pragmas: tuple[str, ...],
    connect: Callable[[], sqlite3.Connection] | None = None,
) -> Engine:
    writes = mode == "rw"
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        creator=connect or (lambda: connect_file(path, mode)),
        poolclass=QueuePool,
        pool_size=1 if writes else 4,
        max_overflow=0 if writes else 16,
        pool_timeout=3600.0,
        # An error must not quote the user's text.
        hide_parameters=True,
        json_deserializer=document,
    )

    def prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        for pragma in (*_EVERY_CONNECTION, *pragmas):
            cursor.execute(pragma)
        cursor.close()

    event.listen(engine, "connect", prepare)
    return engine


def _postgresql(url: URL, **options: object) -> Engine:
    try:
        engine = create_engine(
            url,
            # Rows are sent in bulk as a flat list of values, so by place.
            paramstyle="format",
            poolclass=QueuePool,
            pool_pre_ping=True,
            hide_parameters=True,
            **options,
        )
        event.listen(engine, "do_connect", _connect_postgresql)
        return engine
    except ModuleNotFoundError as error:
        raise StoreError(
            "A PostgreSQL store needs the psycopg package: run `pip install 'psycopg[binary]'`."
        ) from error


def _connect_postgresql(
    dialect: Dialect, _: ConnectionPoolEntry, arguments: Any, options: Any
) -> DBAPIConnection:
    """A connection with our settings, before anything is asked through it.

    Raises StoreError where the database cannot hold every text.
    """
    connection: Any = dialect.connect(*arguments, **options)
    cursor = connection.cursor()
    try:
        # No transaction, which could be idle for too long before its limit is set.
        connection.autocommit = True
        cursor.execute("SELECT current_setting('server_encoding'), current_database()")
        encoding, name = map(_as_text, cursor.fetchone() or ("", ""))
        if encoding != "UTF8":
            raise StoreError(
                f"The PostgreSQL database {name} has the encoding {encoding}, which cannot hold "
                "every text: make one with `createdb -E UTF8 -T template0 NAME`, and give that."
            )
        for setting in _POSTGRESQL:
            cursor.execute(setting)
        connection.autocommit = False
    except BaseException:
        connection.close()
        raise
    finally:
        cursor.close()
    made: DBAPIConnection = connection
    return made


def _as_text(value: object) -> str:
    """Psycopg gives bytes where the encoding is unknown."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
