"""The question about traced prompts against plain NumPy on the full logits of given tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.questions import QUESTIONS
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.analysis import made
from tests.analysis.test_truth import ask, mean, same, softmax


@dataclass(frozen=True)
class Given:
    """A token of a traced prompt, and the probabilities before it, from its logits."""

    message: int
    position: int
    segment: str
    token: str
    token_id: int
    probs: np.ndarray

    @property
    def surprisal(self) -> float:
        return -float(np.log(self.probs[self.token_id]))


@pytest.fixture(scope="module")
def given(traced: str) -> list[Given]:
    with TraceReader(traced) as reader:
        replies = (m for c in reader.conversations() for m in reader.messages(c.id))
        (message,) = (m.id for m in replies if m.policy is not None and m.policy.trace_prompt)
        prompt = reader.prompt(message)
        found = [
            Given(
                *(message, at, prompt.segments[at], prompt.tokens[at], prompt.token_ids[at]),
                softmax(reader.tensor(message, at, "logits", given=True).array),
            )
            for at in range(1, len(prompt))
        ]
    assert {"system", "user", "template"} <= {g.segment for g in found}
    return found


def check_surprise(row: dict[str, Any], those: list[Given]) -> None:
    surprisals = [g.surprisal for g in those]
    assert row["tokens"] == len(those)
    same(row["surprisal"], mean(surprisals))
    same(row["perplexity"], np.exp(mean(surprisals)))
    same(row["likeliest"], mean(g.probs.argmax() == g.token_id for g in those))
    same(row["entropy"], mean(-(g.probs * np.log(g.probs)).sum() for g in those))
    most = those[int(np.argmax(surprisals))]
    assert row["token"] == most.token
    same(row["max_surprisal"], most.surprisal)


def test_surprising_segments(session: QuerySession, given: list[Given]) -> None:
    rows = ask(session, "prompt")
    assert {row["segment"] for row in rows} == {g.segment for g in given}
    for row in rows:
        check_surprise(row, [g for g in given if g.segment == row["segment"]])
    assert [row["surprisal"] for row in rows] == sorted(
        (r["surprisal"] for r in rows), reverse=True
    )


def test_surprising_prompts(session: QuerySession, given: list[Given]) -> None:
    (row,) = ask(session, "prompt", "message")
    assert row["message"] == given[0].message
    check_surprise(row, given)


def test_surprising_tokens(session: QuerySession, given: list[Given]) -> None:
    rows = ask(session, "prompt", "token", top=5)
    ordered = sorted(given, key=lambda g: -g.surprisal)[:5]
    assert [row["position"] for row in rows] == [g.position for g in ordered]
    for row, g in zip(rows, ordered, strict=True):
        assert (row["token"], row["segment"]) == (g.token, g.segment)
        same(row["surprisal"], g.surprisal)
        assert row["rank"] == 1 + (g.probs > g.probs[g.token_id]).sum()


def test_one_segment(session: QuerySession, given: list[Given]) -> None:
    of_user = [g for g in given if g.segment == "user"]
    (row,) = ask(session, "prompt", "message", segment="user")
    check_surprise(row, of_user)
    (row,) = ask(session, "prompt", segment="user")
    assert (row["segment"], row["tokens"]) == ("user", len(of_user))
    assert ask(session, "prompt", "token", segment="tool") == []


def entropy(g: Given) -> float:
    return -float((g.probs * np.log(g.probs)).sum())


def test_the_least_certain_tokens_of_an_origin(session: QuerySession, given: list[Given]) -> None:
    rows = ask(session, "uncertainty", origin="given", top=5)
    ordered = sorted(given, key=lambda g: -entropy(g))[:5]
    assert [(row["step"], row["position"]) for row in rows] == [(None, g.position) for g in ordered]
    for row, g in zip(rows, ordered, strict=True):
        assert row["chosen"] == g.token
        same(row["entropy"], entropy(g))
    (reply,) = ask(session, "uncertainty", "reply", origin="given")
    assert (reply["steps"], reply["step"]) == (len(given), None)
    assert (reply["position"], reply["chosen"]) == (ordered[0].position, ordered[0].token)
    (count,) = session.sql("SELECT count(*) FROM step").rows[0]
    generated = ask(session, "uncertainty", top=1000)
    assert generated == ask(session, "uncertainty", origin="sampled", top=1000)
    assert all(row["step"] is not None for row in generated)
    assert ask(session, "uncertainty", origin="forced") == []
    every = ask(session, "uncertainty", origin="all", top=1000)
    assert len(every) == count == len(generated) + len(given)


def test_given_tokens_in_sql(session: QuerySession, given: list[Given]) -> None:
    """They are in every table of steps, and no question but ``prompt`` speaks of them."""
    for table in ("step", "topk_entry", "lens_layer", "lens_entry", "attention_layer"):
        key = "id" if table == "step" else "step_id"
        sql = f"SELECT count(DISTINCT {key}) FROM {table} WHERE step_index IS NULL"
        assert session.sql(sql).rows == ((len(given),),)
    rows = session.sql("SELECT DISTINCT origin, step_index IS NULL FROM step ORDER BY 1").rows
    assert rows == (("given", True), ("sampled", False))
    assert session.sql("SELECT trace_prompt, count(*) FROM message GROUP BY 1 ORDER BY 1").rows == (
        ("full", 1),
        (None, 8),
    )


@pytest.mark.parametrize("question", ["layers", "settle"])
def test_the_layers_of_given_tokens(
    session: QuerySession, given: list[Given], question: str
) -> None:
    steps = {
        origin: sum(row["steps"] for row in ask(session, question, origin=origin))
        for origin in ("generated", "given", "all")
    }
    assert steps["given"] > 0 and steps["generated"] > 0
    assert steps["all"] == steps["given"] + steps["generated"]
    if question == "layers":
        rows = ask(session, question, origin="given")
        assert {row["steps"] for row in rows} == {len(given)}
        last = max(rows, key=lambda row: row["layer"])
        same(last["chosen_prob"], mean(g.probs[g.token_id] for g in given))
        assert last["kl"] == pytest.approx(0, abs=1e-6)


def test_a_forced_first_token_is_a_generated_one_without_a_decision(tmp_path: Path) -> None:
    """As in a branch: every question has an answer, and ``--origin`` tells it from the rest."""
    db = str(tmp_path / "store.db")
    with TraceWriter(db) as writer:
        replies = []
        for seed in (1, 2):
            _, reply = made.begin(writer, steps=0, tensors="exact")
            rng = np.random.default_rng(seed)
            first = builders.step(0, rng, with_lens=True)
            forced = replace(first, origin="forced", decision=None, sampled_prob=None)
            writer.append(reply, [forced, builders.step(1, rng, with_lens=True)])
            made.finish(writer, reply)
            replies.append(str(reply))
    with QuerySession(db) as session:
        rows = ask(session, "uncertainty", origin="forced")
        assert sorted((row["message"], row["step"]) for row in rows) == [
            (int(reply), 0) for reply in replies
        ]
        assert len(ask(session, "uncertainty")) == 4
        assert len(ask(session, "uncertainty", origin="sampled")) == 2
        for question in QUESTIONS.values():
            if not question.compares:
                for view in question.offered:
                    rows = ask(session, question.name, view)
                    # No prompt was traced, nothing is branched, and random lenses have no rival.
                    assert rows or question.name in ("prompt", "rivals", "forks")
        for subjects in (replies, [f"{reply}:0" for reply in replies]):
            assert questions.answer(session, "compare", tuple(subjects)).rows
