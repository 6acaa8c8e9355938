"""Connects Alembic to a store through the program's own engine, in one transaction.

``oki-trace migrate`` passes its connection; the ``alembic`` command line uses the store
that ``OKI_TRACE_DB`` names.
"""

from __future__ import annotations

from alembic import context
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from oki_trace.settings import Settings
from oki_trace.store.schema import identity, migrate
from oki_trace.store.schema.models import Base


def run(connection: Connection) -> None:
    sqlite = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        # SQLite can roll back DDL when the driver does not begin transactions itself; Alembic
        # assumes that it cannot.
        transactional_ddl=True,
        # SQLite can make most changes of a table only by rebuilding it.
        render_as_batch=sqlite,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    revision = context.get_context().get_current_revision()
    scripts = ScriptDirectory.from_config(context.config)
    steps = scripts.iterate_revisions(revision, "base") if revision else ()
    identity.stamp(connection, len(list(steps)))


if context.is_offline_mode():
    raise CommandError("A migration needs the store itself: run it without --sql.")
elif (connection := context.config.attributes.get("connection")) is not None:
    run(connection)
else:
    db = Settings.from_environment().db
    migrate.prepare(db)
    with migrate.migration(db) as opened:
        run(opened)
