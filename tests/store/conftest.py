"""Stores to test on: a file, and a real PostgreSQL server that starts in half a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.store.stores import Store


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a store that does not exist yet, on each engine."""
    if request.param == "sqlite":
        yield str(tmp_path / "store.db")
        return
    url = request.getfixturevalue("postgresql")
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    yield url


@pytest.fixture
def store(db: str) -> Iterator[Store]:
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        yield Store(db, writer, reader)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of a SQLite store that does not exist yet."""
    return tmp_path / "store.db"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
