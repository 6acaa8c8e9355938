"""How Alembic reaches a store: through the program's own engine, in one transaction.

``oki-trace migrate`` hands its connection over; the ``alembic`` command line
works on the store that ``OKI_TRACE_DB`` names.
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
        # SQLite can undo DDL once the driver no longer begins transactions
        # itself; Alembic assumes it cannot.
        transactional_ddl=True,
        # SQLite changes most things of a table only by building it anew.
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
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    db = Settings.from_environment().db
    migrate.prepare(db)
    with migrate.migration(db) as opened:
        run(opened)
