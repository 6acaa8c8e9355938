"""What SQL asks of the full tensors, against plain NumPy on what the reader gives."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.tables import FUNCTIONS
from oki_trace.errors import QuestionError
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.analysis import made

STEPS = 40  # more than are read at once
DISTANCES = ("kl", "kl_reverse", "js", "tv")


def reply(writer: TraceWriter, seed: int, said: list[str], **options: Any) -> int:
    """A reply that says these tokens, with tensors of its own."""
    model = options.pop("model", "tiny/model")
    rng = np.random.default_rng(seed)
    _, number = made.begin(writer, steps=0, tensors="half", model=model)
    steps = [builders.step(i, rng, token=token, **options) for i, token in enumerate(said)]
    writer.append(number, steps)
    made.finish(writer, number)
    return number


def probs(session: QuerySession, message: int, step: int) -> np.ndarray:
    logits = session.reader.tensor(message, step, "logits").array.astype(np.float64)
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def step_distances(p: np.ndarray, q: np.ndarray) -> tuple[float, float, float, float]:
    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * np.log(a / b)).sum())

    m = (p + q) / 2
    return kl(p, q), kl(q, p), (kl(p, m) + kl(q, m)) / 2, float(np.abs(p - q).sum() / 2)


def rows(session: QuerySession, sql: str) -> list[dict[str, Any]]:
    found = session.sql(sql)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def test_distances_of_any_steps(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        a, b = (reply(writer, seed, [" a"] * STEPS) for seed in (0, 1))
        found = rows(
            session,
            f"SELECT x, unnest(distance({a}, x, {b}, {STEPS - 1} - x)) FROM range({STEPS}) t(x)"
            " ORDER BY x DESC",
        )
        assert [row["x"] for row in found] == list(reversed(range(STEPS)))
        for row in found:
            p, q = probs(session, a, row["x"]), probs(session, b, STEPS - 1 - row["x"])
            exact = step_distances(p, q)
            # A millionth of a nat, or of the larger KL.
            assert [row[name] for name in DISTANCES] == pytest.approx(
                exact, rel=0, abs=1e-6 * max(1, *exact[:2])
            )
            assert row["top_rank"] == 1 + (q > q[p.argmax()]).sum()
            assert row["basis"] == "full logits"


def test_two_models_up_to_where_they_part(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    said = [" a"] * 5
    with TraceWriter(path) as writer, QuerySession(path) as session:
        a = reply(writer, 0, said, model="one")
        b = reply(writer, 1, [*said[:2], " the", *said[3:]], model="two")
        answer = questions.answer(session, "compare", ("one", "two"))
        (row,) = rows(session, answer.sql)
        assert (row["reply"], row["other"], row["common_prefix"], row["steps"]) == (a, b, 2, 3)
        each = np.array(
            [step_distances(probs(session, a, i), probs(session, b, i)) for i in range(3)]
        )
        assert [row[name] for name in DISTANCES] == pytest.approx(
            each.mean(axis=0), rel=1e-6, abs=1e-6
        )
        alike = [probs(session, a, i).argmax() == probs(session, b, i).argmax() for i in range(3)]
        assert row["same_top"] == pytest.approx(np.mean(alike))
        assert answer.about.startswith("3 steps of 1 prompts: ")


def test_two_models_from_an_even_sample_of_their_steps(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        a = reply(writer, 0, [" a"] * STEPS, model="one")
        b = reply(writer, 1, [" a"] * STEPS, model="two")
        answer = questions.answer(session, "compare", ("one", "two"), sample=8)
        (row,) = rows(session, answer.sql)
        assert (row["common_prefix"], row["steps"], row["steps_read"]) == (STEPS, STEPS, 8)
        read = range(0, STEPS, STEPS // 8)
        each = np.array([step_distances(probs(session, a, i), probs(session, b, i)) for i in read])
        assert [row[name] for name in DISTANCES] == pytest.approx(
            each.mean(axis=0), rel=1e-6, abs=1e-6
        )
        assert answer.about.startswith(f"8 of {STEPS} steps, evenly spaced, of 1 prompts: ")


def test_logits_that_are_no_numbers_leave_the_lists(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        a, (_, b) = reply(writer, 0, [" a"]), made.begin(writer, steps=0, tensors="exact")
        step = builders.step(0, np.random.default_rng(1), token=" a")
        broken = [
            replace(one, array=np.full_like(one.array, np.nan)) if one.name == "logits" else one
            for one in step.tensors
        ]
        writer.append(b, [replace(step, tensors=tuple(broken))])
        made.finish(writer, b)
        (row,) = rows(session, f"SELECT unnest(distance({a}, 0, {b}, 0))")
        assert row["basis"].startswith("top-") and row["kl"] > 0


def test_another_vocabulary_is_compared_by_the_tokens_texts(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        a = reply(writer, 0, [" a"])
        b = reply(writer, 1, [" a"], vocab=7, topk=7)
        what = f"{a}:0", f"{b}:0"
        answer = questions.answer(session, "compare", what)
        assert "from top-7" in answer.about
        found = {row["token"]: row for row in rows(session, answer.sql)}
        tops = [session.reader.step(message, 0).topk for message in (a, b)]
        assert found.keys() == {token for top in tops for token in top.tokens}
        for token, row in found.items():
            if row["other_prob"] is not None:
                place = tops[1].tokens.index(token)
                other = probs(session, b, 0)[int(tops[1].token_ids[place])]
                assert row["other_prob"] == pytest.approx(other)


def test_the_standing_of_any_token_and_what_is_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        kept = reply(writer, 0, [" a", " the"])
        _, bare = made.whole(writer)
        found = rows(session, f"SELECT t, unnest(token_rank({kept}, 1, t)) FROM range(50) x(t)")
        p = probs(session, kept, 1)
        assert [row["prob"] for row in found] == pytest.approx(p)
        assert [row["rank"] for row in found] == [1 + (p > one).sum() for one in p]
        kept_by = "SELECT id FROM message WHERE keeps(id, 'logits')"
        assert session.sql(kept_by).rows == ((kept,),)
        nothing = [
            f"token_rank({kept}, 1, 50)",
            f"token_rank({kept}, 1, -1)",
            f"token_rank({bare}, 0, 1)",
            f"distance({kept}, 0, {kept}, 99)",
            f"distance({kept}, 0, 99, 0)",
            f"distance({kept}, NULL, {kept}, 0)",
            f"head_shares({bare}, 0)",
            f"head_shares({kept}, 99)",
            f"keeps({kept}, NULL)",
        ]
        (row,) = session.sql(f"SELECT {', '.join(nothing)}").rows
        assert row == (None,) * len(nothing)


def test_each_function_is_told_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        made.whole(writer)
        for function in FUNCTIONS:
            given = (
                "1" if kind == "BIGINT" else "'logits'" for kind in function.parameters.values()
            )
            found = session.sql(f"SELECT {function.name}({', '.join(given)})")
            assert found.kinds == (function.returns,)


def test_a_damaged_tensor_is_told_in_its_own_words(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer:
        a = reply(writer, 0, [" a"])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE tensor SET data = zeroblob(9) WHERE name = 'logits'")
    with QuerySession(path) as session:
        for sql in (f"SELECT distance({a}, 0, {a}, 0)", f"SELECT token_rank({a}, 0, 1)"):
            with pytest.raises(QuestionError, match=r"^The stored tensor logits is damaged"):
                session.sql(sql)


def test_a_query_session_that_is_still_open_lets_the_program_end_quietly(tmp_path: Path) -> None:
    """As in the explorer, whose caches nobody empties."""
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer:
        a = reply(writer, 0, [" a"])
    program = f"""
import threading
from oki_trace.analysis.query_session import QuerySession
session = QuerySession({path!r})
session.sql("SELECT distance({a}, 0, {a}, 0)")
threading.Thread(target=lambda held: threading.Event().wait(), args=(session,), daemon=True).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
