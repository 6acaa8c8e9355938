"""Stores to ask questions of: one traced with the real model, and made-up ones on each engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from oki_trace.analysis.query_session import QuerySession
from oki_trace.api import run_traced

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, Any]) -> str:
    """Four short replies of SmolLM2 with all their tensors. Leave the store as it is.

    The first has a system message and a traced prompt; the other three answer one prompt: greedy,
    and drawn with two seeds.
    """
    db = str(tmp_path_factory.mktemp("traced") / "store.db")
    model, tokenizer = smollm2
    common: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "db": db, "tensors": "exact"}
    asked = [
        {"role": "system", "content": "You are a poet."},
        {"role": "user", "content": "Name a river."},
    ]
    run_traced(messages=asked, max_new_tokens=6, trace_prompt="full", **common)
    run_traced(QUESTION, max_new_tokens=10, trace_prompt="none", **common)
    for seed in (1, 2):
        run_traced(
            QUESTION,
            max_new_tokens=6,
            temperature=1.2,
            seed=seed,
            trace_prompt="none",
            **common,
        )
    return db


@pytest.fixture(scope="session")
def session(traced: str) -> Iterator[QuerySession]:
    """Questions to the traced store."""
    with QuerySession(traced) as opened:
        yield opened


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def db(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of a store that does not exist yet, on each engine; its cache in ``tmp_path``."""
    if request.param == "sqlite":
        yield str(tmp_path / "store.db")
        return
    # The cache of a server's store lies in the data folder below the current one.
    monkeypatch.chdir(tmp_path)
    url = request.getfixturevalue("postgresql")
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    yield url
