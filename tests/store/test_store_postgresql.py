"""A PostgreSQL store means the same whatever its server, database or role prefers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from oki_trace.errors import StoreError
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import DONE, Store, plain

pytestmark = pytest.mark.postgresql

SETTINGS = {
    "datestyle": "German",
    "timezone": "Asia/Kathmandu",
    "client_encoding": "LATIN1",
    "standard_conforming_strings": "off",
    "bytea_output": "escape",
    "extra_float_digits": "-3",
    "intervalstyle": "iso_8601",
    "transform_null_equals": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    # Milliseconds: enough for the first statement of a session, and for no sleep of a test.
    "statement_timeout": "50",
    "lock_timeout": "50",
    "idle_in_transaction_session_timeout": "50",
}


def _server(url: str, *statements: str) -> None:
    engine = create_engine(
        url.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@pytest.fixture
def own(postgresql: str) -> Iterator[str]:
    """A database of this test's own."""
    _server(postgresql, "DROP DATABASE IF EXISTS own", "CREATE DATABASE own")
    yield postgresql.replace("/postgres?", "/own?")
    _server(postgresql, "DROP DATABASE own WITH (FORCE)")


def filled(db: str, name: str) -> tuple[object, object]:
    """What is read again of a conversation with hostile text, a time and every kind of number."""
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        store = Store(db, writer, reader)
        with writer._engine.begin() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(0.2)")
            time.sleep(0.2)
            limits = [name for name in SETTINGS if name.endswith("timeout")]
            assert {connection.exec_driver_sql(f"SHOW {name}").scalar() for name in limits} == {"0"}
        conversation = writer.create_conversation(f"{name} \\' é 🙂")
        _, message = store.reply("half", conversation=conversation)
        rng = np.random.default_rng(4)
        step = builders.coherent_step(0, rng, token="\\x41 ' é")
        writer.append(message, [step])
        writer.finish_reply(message, DONE)
        said = reader.message(message)
        assert abs((said.created_at - reader.conversation(conversation).created_at).days) < 1
        assert [str(one) for one in Verification(reader)] == []
        return plain(next(reader.iter_steps(message))), said.content


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_database_prefers_changes_nothing(own: str, setting: str) -> None:
    before = filled(own, "before")
    _server(own, f"ALTER DATABASE own SET {setting} = '{SETTINGS[setting]}'")
    assert filled(own, "after") == before
    with TraceReader(own) as reader:
        assert {c.title.split()[0] for c in reader.conversations()} == {"before", "after"}
        assert [str(one) for one in Verification(reader)] == []


def test_what_a_role_prefers_changes_nothing(own: str) -> None:
    try:
        # In one session: what a role prefers holds for the next.
        preferred = [f"ALTER ROLE postgres SET {name} = '{SETTINGS[name]}'" for name in SETTINGS]
        _server(own, *preferred)
        filled(own, "all")
    finally:
        engine = create_engine(
            own.replace("postgresql://", "postgresql+psycopg://"),
            isolation_level="AUTOCOMMIT",
            connect_args={"options": "-c statement_timeout=0 -c default_transaction_read_only=off"},
        )
        with engine.connect() as connection:
            connection.execute(text("ALTER ROLE postgres RESET ALL"))
        engine.dispose()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_text_is_refused(postgresql: str, encoding: str) -> None:
    _server(
        postgresql,
        "DROP DATABASE IF EXISTS narrow",
        f"CREATE DATABASE narrow ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0",
    )
    db = postgresql.replace("/postgres?", "/narrow?")
    try:
        for opened in (TraceWriter, TraceReader):
            with pytest.raises(StoreError) as raised:
                opened(db)
            assert f"has the encoding {encoding}" in str(raised.value)
            assert "createdb -E UTF8" in str(raised.value)
            assert "\n" not in str(raised.value)
    finally:
        _server(postgresql, "DROP DATABASE narrow WITH (FORCE)")
