"""Making and upgrading a store: the schema, its history, and the data that goes through."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from oki_trace.errors import SchemaError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, migrate
from oki_trace.store.schema.models import Base
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

NEXT = """
revision = "next00000000"
down_revision = "{head}"
import sqlalchemy as sa
from alembic import op
def upgrade():
    with op.batch_alter_table("conversation", recreate="always") as batch:
        batch.add_column(sa.Column("note", sa.Text()))
{also}
def downgrade():
    with op.batch_alter_table("conversation") as batch:
        batch.drop_column("note")
"""


def newer_scripts(tmp_path: Path, also: str = "") -> Path:
    """The migrations and one more, which rebuilds a table that others hang on."""
    scripts = tmp_path / "a release % later"
    shutil.copytree(migrate.scripts_folder(), scripts)
    revision = NEXT.format(head=migrate.head(), also=also)
    (scripts / "versions" / "next_one.py").write_text(revision)
    return scripts


def filled(db: Path) -> int:
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("kept")
        message = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(message, builders.turn_start())
        rng = np.random.default_rng(0)
        writer.append(message, [builders.step(i, rng, with_lens=True) for i in range(3)])
    return message


def test_the_models_say_what_the_migrations_made(db: str) -> None:
    migrate.ensure(db)
    with migrate.migration(db) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_tables_are_clustered_and_ids_never_reused(file: Path) -> None:
    migrate.ensure(file)
    with closing(sqlite3.connect(file)) as connection:
        made = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type='table'"))
    for table in ("topk_entry", "attention_entry", "lens_entry", "lens_layer", "prompt_token"):
        assert "WITHOUT ROWID" in made[table]
    for table in ("conversation", "message", "step", "tensor"):
        assert "AUTOINCREMENT" in made[table]


def test_the_history_is_one_line_and_the_program_knows_it() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrate.scripts_folder()))
    scripts = ScriptDirectory.from_config(config)
    assert len(scripts.get_heads()) == 1
    known = [script.revision for script in scripts.walk_revisions()]
    assert tuple(reversed(known)) == identity.HISTORY


def test_down_and_up_again_twice(db: str) -> None:
    assert migrate.current(db) is None
    for _ in range(2):
        migrate.upgrade(db)
        assert migrate.current(db) == migrate.head()
        with TraceReader(db) as reader:
            assert reader.version() == 0
        migrate.downgrade(db, "base")
        assert migrate.current(db) is None


def test_data_and_children_survive_a_table_built_anew(file: Path, tmp_path: Path) -> None:
    message = filled(file)
    scripts = newer_scripts(tmp_path)
    migrate.upgrade(file, scripts=scripts)
    assert migrate.current(file) == "next00000000"
    for open_it in (TraceReader, TraceWriter):
        with pytest.raises(SchemaError, match="newer oki-trace"):
            open_it(file)
    with pytest.raises(SchemaError, match="newer"):
        migrate.upgrade(file)
    backup = file.with_name(f"store.db.schema-{identity.SCHEMA}.bak")
    assert backup.stat().st_mode & 0o777 == 0o600
    migrate.downgrade(file, identity.HISTORY[-1], scripts=scripts)
    for path in (file, backup):
        with TraceReader(path) as reader:
            assert len(list(reader.iter_steps(message))) == 3
            assert reader.tensor_names(message, 2)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    migrate.upgrade(file, scripts=scripts)
    assert file.with_name(f"store.db.schema-{identity.SCHEMA}-1.bak").exists(), (
        "no backup is overwritten"
    )


def test_a_migration_that_fails_changes_nothing(file: Path, tmp_path: Path) -> None:
    message = filled(file)
    scripts = newer_scripts(tmp_path, also='    op.execute("DELETE FROM no_such_table")')
    with pytest.raises(Exception, match="tables are missing"):
        migrate.upgrade(file, scripts=scripts)
    assert migrate.current(file) == migrate.head()
    with TraceReader(file) as reader:
        assert len(reader.steps(message)) == 3


def test_an_older_store_is_upgraded_for_writing_and_refused_for_reading(file: Path) -> None:
    migrate.upgrade(file)
    migrate.downgrade(file, "base")
    with pytest.raises(SchemaError, match="oki-trace migrate"):
        TraceReader(file)
    with TraceWriter(file) as writer:
        writer.create_conversation("x")


def test_first_opens_at_the_same_moment_do_not_meet(db: str) -> None:
    script = (
        "import sys; from oki_trace.store.writing.writer import TraceWriter\n"
        "with TraceWriter(sys.argv[1]) as writer: writer.create_conversation('x')"
    )
    many = [subprocess.Popen([sys.executable, "-c", script, db]) for _ in range(4)]
    assert [process.wait(60) for process in many] == [0] * 4
    with TraceReader(db) as reader:
        assert reader.info().conversations == 4


def test_the_alembic_command_line_works_on_the_store_of_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OKI_TRACE_DB", str(file))
    for command in (["upgrade", "head"], ["check"], ["downgrade", "base"], ["upgrade", "head"]):
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *command], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    with TraceReader(file) as reader:
        assert reader.version() == 0
