"""The database engines of a store, with the reason for every pragma.

The writer has one connection and takes the write lock when a transaction begins. The
reader cannot write, and each of its transactions is one snapshot. The migrator does not
enforce foreign keys, because rebuilding a table would delete its children.
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
from oki_trace.store.schema.column_types import read_document
from oki_trace.store.schema.files import Mode, connect_file, is_outdated, open_to_read
from oki_trace.store.schema.identity import file_of

# Scope: every connection.
_EVERY_CONNECTION = (
    # A store may come from somebody else: no function or trigger in its schema is trusted.
    "PRAGMA trusted_schema = OFF",
)
# Scope: the connections that write traces.
_WRITER = (
    # In WAL mode, NORMAL cannot corrupt the file when power fails, and saves an fsync per
    # step; only the last moments can be lost.
    "PRAGMA synchronous = NORMAL",
    # Deleting a conversation deletes everything that belongs to it.
    "PRAGMA foreign_keys = ON",
    # The inner pages of every tree stay in memory while a reply is written.
    "PRAGMA cache_size = -32768",
    # The log shrinks again after a reader has held it open for long.
    "PRAGMA journal_size_limit = 67108864",
)
# 32 MB of 4 KB pages. The default of 4 MB would checkpoint, with fsyncs, every few tokens
# when each has a few hundred KB of tensors. Larger pages would need fewer overflow pages,
# but every small row writes a whole page to the log.
_CHECKPOINT_RARELY = "PRAGMA wal_autocheckpoint = 8192"
# SQLite before 3.51.3 can damage a file when two connections checkpoint at the same instant,
# so only one process does. (The last connection to close checkpoints too, but holds the file
# exclusively.)
_CHECKPOINT_NEVER = "PRAGMA wal_autocheckpoint = 0"
# Scope: the connections that read, of which there may be many.
_READER = (
    # mode=ro protects the file; this also forbids temporary tables.
    "PRAGMA query_only = ON",
    "PRAGMA cache_size = -16384",
)

# Scope: every connection to a server. A role, a database or a server may have other defaults
# for settings that change the meaning of a value or a statement.
# The last three: a step may wait for another writer, and copying a long conversation takes
# long. Numbers have every bit; extra_float_digits below 1 would round them.
_POSTGRESQL = """
SET client_encoding = 'UTF8';
SET datestyle = 'ISO, YMD';
SET intervalstyle = 'postgres';
SET timezone = 'UTC';
SET standard_conforming_strings = on;
SET transform_null_equals = off;
SET bytea_output = 'hex';
SET extra_float_digits = 1;
SET default_transaction_isolation = 'read committed';
SET default_transaction_read_only = off;
SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0
"""


def writer_engine(url: URL, *, checkpoint: bool) -> Engine:
    """One connection for all threads: a second writer waits instead of failing."""
    path = file_of(url)
    if path is None:
        return _postgresql(url)
    pragmas = (*_WRITER, _CHECKPOINT_RARELY if checkpoint else _CHECKPOINT_NEVER)
    engine = _sqlite(path, "rw", pragmas)
    # A transaction that first reads and then writes would fail at once when another process
    # has written in between, however long the busy timeout.
    event.listen(engine, "begin", _begin_immediate)
    return engine


def set_checkpoint(connection: Connection) -> None:
    """Let this writer's connection checkpoint from now on."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_CHECKPOINT_RARELY)


def reader_engine(url: URL, reserve: Reserve | None = None) -> Engine:
    """Connections that cannot write; each transaction sees one snapshot.

    On a full disk they use the space of the ``reserve``.
    """
    path = file_of(url)
    if path is None:
        return _postgresql(
            url, isolation_level="REPEATABLE READ", execution_options={"postgresql_readonly": True}
        )
    usable = reserve or Reserve(path)
    engine = _sqlite(path, "ro", _READER, lambda: open_to_read(path, usable))
    event.listen(engine, "begin", _begin)

    def refuse_outdated(connection: DBAPIConnection, *_: object) -> None:
        if is_outdated(connection, path):
            raise DisconnectionError  # the pool opens another

    event.listen(engine, "checkout", refuse_outdated)
    return engine


def migration_engine(url: URL) -> Engine:
    """For migrations only: tables can be rebuilt without losing their children."""
    path = file_of(url)
    if path is None:
        return _postgresql(url)
    engine = _sqlite(path, "rw", ("PRAGMA foreign_keys = OFF",))
    event.listen(engine, "begin", _begin_immediate)
    return engine


def autocommit_engine(url: URL) -> Engine:
    """PostgreSQL only, for statements that cannot run inside a transaction."""
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
        json_deserializer=read_document,
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
            # Bulk inserts pass a flat list of values.
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
    """A connection with our settings in force.

    Raises StoreError where the database cannot store every text.
    """
    connection: Any = dialect.connect(*arguments, **options)
    cursor = connection.cursor()
    try:
        # Without a transaction, which could be idle for too long before its limit is set.
        connection.autocommit = True
        # In one message and first: a limit of the role's own would end a longer statement.
        cursor.execute(_POSTGRESQL)
        cursor.execute("SELECT current_setting('server_encoding'), current_database()")
        encoding, name = map(_as_text, cursor.fetchone() or ("", ""))
        if encoding != "UTF8":
            raise StoreError(
                f"The PostgreSQL database {name} has the encoding {encoding}, which cannot hold "
                "every text: create a database with `createdb -E UTF8 -T template0 NAME`, and use "
                "that."
            )
        connection.autocommit = False
    except BaseException:
        connection.close()
        raise
    finally:
        cursor.close()
    checked: DBAPIConnection = connection
    return checked


def _as_text(value: object) -> str:
    """Psycopg returns bytes where it does not know the encoding."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
