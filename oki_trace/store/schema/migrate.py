"""Creates and upgrades a store; only Alembic creates the schema.

Guarantees: an upgrade is atomic; a file with an older schema is copied before it is
changed; two processes can open a new store at the same moment; a file that is not a
store is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from sqlalchemy import Connection, func, select
from sqlalchemy.engine import URL

from oki_trace.errors import SchemaError, StoreError
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.schema import identity
from oki_trace.store.schema.engine import migration_engine, reader_engine
from oki_trace.store.schema.files import connect_file
from oki_trace.store.schema.identity import Db

if TYPE_CHECKING:
    from alembic.config import Config

# PostgreSQL's lock for one migration at a time: any number, the same in every process.
_ADVISORY_LOCK = 0x6F6B6974


def ensure(db: Db) -> None:
    """Create the store if it does not exist, upgrade it if it is older; otherwise cheap."""
    url = identity.address(db)
    store = identity.shown(url)
    path = identity.file_of(url)
    if path is None or identity.is_ours(path):
        with translate_errors(store), _reading(url) as connection:
            schema = identity.schema_of(connection)
        identity.refuse_newer(schema, store)
        if schema == identity.SCHEMA:
            return
    upgrade(db)


def upgrade(db: Db, revision: str = "head", *, scripts: Path | None = None) -> None:
    """Upgrade the store to ``revision``; create it if it does not exist."""
    from alembic import command

    _run(db, scripts, lambda config: command.upgrade(config, revision))


def downgrade(db: Db, revision: str, *, scripts: Path | None = None) -> None:
    """Downgrade the store to an older ``revision``; "base" removes every table."""
    from alembic import command

    _run(db, scripts, lambda config: command.downgrade(config, revision))


def current(db: Db) -> str | None:
    """The revision of the store; None when it has no schema or does not exist."""
    from alembic.migration import MigrationContext

    url = identity.address(db)
    path = identity.file_of(url)
    if path is not None and not identity.is_ours(path):
        return None
    with translate_errors(identity.shown(url)), _reading(url) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head() -> str:
    """The revision this program reads and writes."""
    return identity.HISTORY[-1]


def scripts_folder() -> Path:
    """The folder of the migrations: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "_bundled" / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise StoreError("The migrations are missing from this installation: install oki-trace again.")


@contextmanager
def migration(db: Db) -> Iterator[Connection]:
    """A connection in one transaction, foreign keys not enforced."""
    engine = migration_engine(identity.address(db))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _reading(url: URL) -> Iterator[Connection]:
    engine = reader_engine(url)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def prepare(db: Db) -> None:
    """Create the file of a new store, or refuse one that is not ours."""
    path = identity.file_of(identity.address(db))
    if path is None:
        return
    if not identity.is_ours(path):
        identity.create_file(path)
    # Always, because the process that created the file may have been killed before this.
    with closing(connect_file(path, "rw")) as connection:
        identity.mark(connection)
        connection.execute("PRAGMA journal_mode = WAL")


def _run(db: Db, scripts: Path | None, action: Callable[[Config], None]) -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    url = identity.address(db)
    store = identity.shown(url)
    config = Config()
    # Alembic reads options with %-interpolation.
    config.set_main_option("script_location", str(scripts or scripts_folder()).replace("%", "%%"))
    newest = len(list(ScriptDirectory.from_config(config).walk_revisions()))
    with _one_at_a_time(identity.file_of(url)), translate_errors(store):
        prepare(db)
        _back_up_if_older(identity.file_of(url), newest)
        with migration(db) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            config.attributes["connection"] = connection
            try:
                action(config)
            except CommandError as error:
                raise SchemaError(
                    f"The store {store} cannot be migrated ({error}): it may come from a newer "
                    "oki-trace; upgrade this one."
                ) from error


def _one_at_a_time(path: Path | None) -> AbstractContextManager[object]:
    """A lock against other processes; PostgreSQL has its own."""
    if path is None:
        return nullcontext()
    identity.create_folder(path)
    return FileLock(path.with_name(path.name + ".migrate.lock"), mode=0o600)


def _back_up_if_older(path: Path | None, newest: int) -> None:
    """Copy a file with an older schema."""
    if path is None:
        return
    with closing(connect_file(path, "ro")) as source:
        schema = source.execute("PRAGMA user_version").fetchone()[0]
        if not 0 < schema < newest:
            return
        for number in count():
            suffix = f"-{number}" if number else ""
            copy = path.with_name(f"{path.name}.schema-{schema}{suffix}.bak")
            with suppress(FileExistsError):
                os.close(os.open(copy, os.O_CREAT | os.O_EXCL, 0o600))
                break
        with closing(connect_file(copy, "rw")) as target:
            source.backup(target)
