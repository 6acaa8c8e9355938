"""The address of a store, the mark that identifies it, and its schema number.

A SQLite store has our ``application_id`` in its header from the first write on, and the
number of its schema in ``user_version``; on PostgreSQL, Alembic's table has both.
Guarantee: a foreign file is recognised without a lock, a log or a journal, so it is
never changed; a store newer than this program is refused.

Only SQLite opens a store's file. When a process closes any descriptor of a file, POSIX
drops all locks that the process holds on it, those of its SQLite connections too, and
another process may then delete the log that they read (sqlite.org, "How To Corrupt An
SQLite Database File", section 2.2).
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy import DDL, Connection, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from oki_trace.errors import SchemaError, StoreError, UsageError

Db = str | Path | URL

# Every revision, oldest first; the number of a schema is its place here, from 1.
HISTORY = ("f0b1c5a7d2e4", "3c9a7e5d1b42", "8d41f6b0c7a3", "5e2c90b7d418", "b7e4f1a90c36")
SCHEMA = len(HISTORY)

APPLICATION_ID = 0x6F6B6974  # "okit"
_SET_APPLICATION_ID = "PRAGMA application_id = 1869310324"

_DAMAGED = (
    "The store {path} cannot be used: the file is damaged. Restore a backup, or export what can "
    "still be read."
)
_NO_URL = (
    "The store's address is not a valid URL: write `postgresql://user:password@host/database` "
    "or a file path."
)


def address(db: Db) -> URL:
    """The URL of a store given by path or by URL."""
    if isinstance(db, URL):
        url = db
    elif isinstance(db, str) and "://" in db:
        try:
            url = make_url(db)
        except (ArgumentError, ValueError):
            # Without the cause, which may quote the password.
            raise UsageError(_NO_URL) from None
        if db.count("@") > 1 and url.get_backend_name() != "sqlite":
            # A part of the password may have been parsed as the host, the database or an option.
            raise UsageError(f"{_NO_URL} In a password, write %40 for @, %2F for / and %3F for ?.")
    else:
        url = URL.create("sqlite", database=os.fspath(db))
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise UsageError(
                "A store must be a file that other processes can open: give its plain path."
            )
        return URL.create("sqlite", database=url.database)
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    raise UsageError(
        f"A store cannot be kept in {backend}: give a file path or a postgresql:// URL."
    )


def file_of(url: URL) -> Path | None:
    """The store's file, absolute; None on PostgreSQL."""
    if url.get_backend_name() != "sqlite" or url.database is None:
        return None
    return Path(url.database).expanduser().absolute()


def shown(url: URL) -> str:
    """The store's name in a message: its path, or its URL without any password."""
    path = file_of(url)
    if path:
        return str(path)
    # The server accepts a password among the options too.
    secret = [name for name in url.query if "pass" in name.lower()]
    return url.difference_update_query(secret).render_as_string(hide_password=True)


def is_ours(path: Path) -> bool:
    """Whether ``path`` is a store. False: missing or empty. Any other file is refused."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(path, "it is not a file")
    if not status.st_size:
        return False
    if _application_id(path) != APPLICATION_ID:
        raise SchemaError(
            f"{path} is not an oki-trace store, so it was not changed: give another path with --db."
        )
    return True


def _unreadable(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"The store {path} cannot be read ({reason}): check the path and its permissions."
    )


def _application_id(path: Path) -> int | None:
    """The application id in the file's header; None for a file that SQLite did not write."""
    try:
        # An ordinary connection could create a log beside the file of another program.
        return _read_application_id(path, "mode=ro&immutable=1")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname == "SQLITE_NOTADB":
            return None
        if error.sqlite_errorname.startswith("SQLITE_CANTOPEN"):
            raise _unreadable(path, os.strerror(_errno_of(path))) from error
    # Read without a lock, a file that another process checkpoints looks damaged. That process
    # has its shared memory beside the file, so an ordinary connection creates nothing new.
    try:
        if path.with_name(path.name + "-shm").exists():
            return _read_application_id(path, "mode=ro")
    except sqlite3.DatabaseError as error:
        raise StoreError(_DAMAGED.format(path=path)) from error
    raise StoreError(_DAMAGED.format(path=path))


def _read_application_id(path: Path, options: str) -> int:
    uri = f"{path.as_uri()}?{options}"
    with closing(sqlite3.connect(uri, uri=True, timeout=30.0)) as connection:
        return int(connection.execute("PRAGMA application_id").fetchone()[0])


def _errno_of(path: Path) -> int:
    """Why an existing file cannot be opened: SQLite does not say."""
    return errno.EIO if os.access(path, os.R_OK) else errno.EACCES


def create_file(path: Path) -> None:
    """Create an empty file that only its user can read, unless it exists."""
    create_folder(path)
    with _creating(path), suppress(FileExistsError):
        # It may be closed, because no connection can have a lock on a new file.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def mark(connection: sqlite3.Connection) -> None:
    """Write the mark into a new file, before anything else.

    ``is_ours`` reads it from the file itself, so it is written before the write-ahead log
    is used.
    """
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        connection.execute(_SET_APPLICATION_ID)


def create_folder(path: Path) -> None:
    """Create the missing folders of ``path``, for its user only; others keep their mode."""
    with _creating(path):
        for folder in reversed(path.parents):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _creating(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The store {path} cannot be created ({error.strerror}): give a path you can write "
            "to with --db."
        ) from error


def schema_of(connection: Connection) -> int:
    """The number of the schema: 0 for none, ``SCHEMA + 1`` for any newer one."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if not inspect(connection).has_table("alembic_version"):
        return 0
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if revision is None:
        return 0
    return HISTORY.index(revision) + 1 if revision in HISTORY else SCHEMA + 1


def stamp(connection: Connection, schema: int) -> None:
    """Write the schema's number into a SQLite file; on PostgreSQL Alembic has stored it."""
    if connection.dialect.name == "sqlite":
        # A pragma takes no bound parameter, and SQLAlchemy leaves DDL untyped.
        pragma: DDL = DDL("PRAGMA user_version = %(schema)d", {"schema": schema})  # type: ignore[no-untyped-call]
        connection.execute(pragma)


def refuse_newer(schema: int, store: str) -> None:
    """Raise when the store was written by a later release."""
    if schema > SCHEMA:
        raise SchemaError(
            f"The store {store} was written by a newer oki-trace: upgrade this one, or give "
            "another path with --db."
        )


def refuse_other(schema: int, store: str) -> None:
    """Raise unless the store has exactly the schema this program reads."""
    refuse_newer(schema, store)
    if schema < SCHEMA:
        raise SchemaError(
            f"The store {store} has an older schema than this oki-trace: run `oki-trace migrate`."
        )
