"""``branch``, ``run --continue``, ``--edit``, ``--prefill``: the tree of a conversation."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from oki_trace import load_model_and_tokenizer, run_traced
from oki_trace.errors import UsageError
from oki_trace.exchange.importing import import_path
from oki_trace.records import Message
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.copy import copy
from tests.cli.commands import Oki

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> tuple[Any, Any]:
    """The built-in model and its tokenizer."""
    return load_model_and_tokenizer(str(smollm2_dir), use_4bit=False)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, Any]) -> Path:
    model, tokenizer = smollm2
    path = tmp_path_factory.mktemp("answered") / "tree.db"
    run_traced(QUESTION, max_new_tokens=8, model=model, tokenizer=tokenizer, db=path)
    return path


@pytest.fixture
def db(tmp_path: Path, answered: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one reply of SmolLM2: message 2."""
    path = tmp_path / "tree.db"
    shutil.copyfile(answered, path)
    monkeypatch.setenv("OKI_TRACE_DB", str(path))
    return path


def messages(db: Path) -> list[Message]:
    with TraceReader(db) as reader:
        (conversation,) = reader.conversations()
        return reader.messages(conversation.id)


def texts(db: Path, message: int) -> list[tuple[str, str]]:
    with TraceReader(db) as reader:
        return [(step.token, step.origin) for step in reader.steps(message)]


def faults(db: Path) -> list[str]:
    with TraceReader(db) as reader:
        return [str(finding) for finding in Verification(reader)]


def test_a_candidate_is_taken_in_place_of_the_chosen_one(oki: Oki, db: Path) -> None:
    done = oki("branch", 2, 3, "--rank", 2, "--max-new-tokens", 5)
    assert done.status == 0, done.err
    branch = messages(db)[-1]
    with TraceReader(db) as reader:
        second = reader.step(2, 3).topk.tokens[1]
    assert texts(db, branch.id)[0] == (second, "forced")
    assert branch.content.startswith(f"The capital of{second}")
    assert (branch.branch_of, branch.branch_step, branch.prefix_len) == (2, 3, 3)
    assert second.strip() in done.out and "The capital of" not in done.out
    shown = oki("show", 1, "--message", branch.id).out
    assert "branch of message 2 at step 3" in shown
    assert faults(db) == []


def test_a_text_is_shown_as_tokens_before_it_is_used(oki: Oki, db: Path) -> None:
    done = oki("branch", 2, 3, "--token", " the town", "--max-new-tokens", 4)
    assert done.status == 0, done.err
    assert "Goes on with: ␣the  ␣town" in done.out
    assert texts(db, 3)[:2] == [(" the", "forced"), (" town", "forced")]


def test_the_best_candidates_each_get_a_branch(oki: Oki, db: Path) -> None:
    done = oki("branch", 2, 3, "--top", 3, "--max-new-tokens", 3, "--json")
    made = json.loads(done.out)
    assert [one["steps"] for one in made] == [4, 4, 4]
    with TraceReader(db) as reader:
        tokens = reader.step(2, 3).topk.tokens[:3]
    assert [texts(db, one["message"])[0][0] for one in made] == list(tokens)
    tree = oki("show", 1, "--tree").out
    assert tree.count("from 2 at step 3") == 3


def test_a_damaged_tree_shows_every_message_once(oki: Oki, db: Path) -> None:
    assert oki("run", "And of Spain?", "-c", 1, "--max-new-tokens", 2).status == 0
    with closing(sqlite3.connect(db)) as store, store:
        store.execute("UPDATE message SET parent_id = 3 WHERE id = 2")
        store.execute("UPDATE message SET parent_id = 99 WHERE id = 4")
    lines = oki("show", 1, "--tree").out.splitlines()
    assert sorted(int(line.split()[0]) for line in lines) == [1, 2, 3, 4]


def test_regenerate_edit_prefill_and_continue(oki: Oki, db: Path) -> None:
    assert oki("branch", 2, "--temperature", 1.5, "--seed", 4).status == 0
    assert oki("run", "And of Spain?", "--edit", 1, "--max-new-tokens", 4).status == 0
    assert (
        oki("run", QUESTION, "--edit", 1, "--prefill", "It is", "--max-new-tokens", 3).status == 0
    )
    assert oki("run", "--continue", 5, "--max-new-tokens", 3).status == 0
    found = {message.id: message for message in messages(db)}
    assert (found[3].branch_of, found[3].branch_step, found[3].parent_id) == (2, 0, 1)
    assert found[4].parent_id is None and found[5].parent_id == 4
    assert found[7].content.startswith("It is")
    assert [origin for _, origin in texts(db, 7)][:3] == ["forced", "forced", "sampled"]
    rest = found[8]
    assert (rest.branch_of, rest.branch_step) == (5, 4)
    assert rest.content.startswith(found[5].content)
    assert faults(db) == []


def test_the_same_in_python(db: Path, smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    common: Any = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 4}
    text, trace = run_traced(db=db, branch_of=2, branch_step=3, rank=2, **common)
    assert trace["steps"][0]["origin"] == "forced" and trace["prefix_len"] == 3
    assert text.startswith("The capital of")
    alone, trace = run_traced(QUESTION, prefill="The capital of", **common)
    assert [step["origin"] for step in trace["steps"]] == ["forced"] * 3 + ["sampled"] * 4
    assert alone.startswith("The capital of France")
    with pytest.raises(UsageError, match="Give one of token"):
        run_traced(db=db, branch_of=2, branch_step=3, rank=2, token=" x", **common)
    with pytest.raises(UsageError, match="belong to branch_of"):
        run_traced(QUESTION, rank=2, **common)


@pytest.mark.parametrize("format", ["json", "jsonl", "parquet"])
def test_a_tree_comes_back_from_an_export(oki: Oki, db: Path, tmp_path: Path, format: str) -> None:
    oki("branch", 2, 3, "--rank", 2, "--max-new-tokens", 3)
    oki("run", "Really?", "--after", 2, "--max-new-tokens", 3)
    oki("run", "Another question", "--edit", 1, "--max-new-tokens", 3)
    file = tmp_path / f"tree.{format}"
    assert oki("export", "-c", 1, "-f", format, "-o", file).status == 0
    other, copied = tmp_path / "other.db", tmp_path / "copied.db"
    outcome = import_path(file, other)
    assert outcome.changed == 0
    list(copy(db, copied))
    for target in (other, copied):
        assert faults(target) == []
        for one, two in zip(messages(db), messages(target), strict=True):
            for name in ("parent_id", "branch_of", "branch_step", "prefix_len", "forced", "digest"):
                assert getattr(one, name) == getattr(two, name), (name, one.id)
    alone = tmp_path / "alone.json"
    assert oki("export", "-c", 1, "--branch", 3, "-o", alone).status == 0
    assert [one["id"] for one in json.loads(alone.read_text())["messages"]] == [1, 3]
    if format == "parquet":
        assert (
            oki("export", "-c", 1, "--branch", 6, "-f", format, "-o", tmp_path / "one").status == 0
        )
        assert import_path(tmp_path / "one", tmp_path / "one.db").messages == 2


def test_a_branch_is_scored_as_a_whole_reply(oki: Oki, db: Path) -> None:
    oki("branch", 2, 3, "--rank", 2, "--max-new-tokens", 3)
    done = oki("score", "--message", 3, "--dtype", "float32", "--lens-layers", "none")
    assert done.status == 0, done.err
    with TraceReader(db) as reader:
        branch, score = reader.message(3), reader.message(4)
        prompt, steps = reader.prompt(3), reader.steps(3)
        given = reader.steps(4, given=True)
        kept = prompt.tokens[-branch.prefix_len :]
    assert [step.token for step in given] == [*kept, *(step.token for step in steps)]
    assert score.choice is not None and score.choice.dtype == "float32"
    assert score.content == branch.content
    own = {step.position: step.logprob for step in given}
    for step in steps:
        assert step.logprob == pytest.approx(own[step.position], abs=1e-4)


def test_either_of_two_branches_can_be_deleted(oki: Oki, db: Path) -> None:
    oki("branch", 2, 3, "--rank", 2, "--max-new-tokens", 3)
    oki("run", "Really?", "--after", 2, "--max-new-tokens", 3)
    before = {message.id: message for message in messages(db)}
    assert oki("delete", "--message", 2, "--yes").status == 0
    after = messages(db)
    assert [message.id for message in after] == [1, 3]
    assert after[1].content == before[3].content and after[1].digest == before[3].digest
    assert faults(db) == []
    refused = oki("delete", "--message", 1, "--yes")
    assert refused.status == 1 and "oki-trace delete 1" in refused.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("branch", 2, 99), "Choose a step from 0 to"),
        (("branch", 1, 0), "no generated reply"),
        (("branch", 2, 3, "--rank", 50), "stored candidates"),
        (("branch", 2, 3, "--rank", 1, "--token-id", 3), "Give one of"),
        (("branch", 2, 3, "--token-id", 10_000_000), "token"),
        (("branch", 99, 0), "no message 99"),
        (("run", "--continue", 2), "is complete"),
        (("run", "x", "--continue", 2), "names the reply itself"),
        (("run", "x", "--edit", 2), "oki-trace branch 2"),
        (("run", "x", "--edit", 1, "--after", 2), "not both"),
        (("run", "x", "--prefill", ""), "is empty"),
        (("export", "-c", 1, "--branch", 77), "has no message 77"),
    ],
)
def test_bad_input_gets_a_line_that_says_what_to_do(
    oki: Oki, db: Path, arguments: tuple[object, ...], says: str
) -> None:
    count = len(messages(db))
    done = oki(*arguments)
    assert done.status in (1, 2)
    assert says in done.err and len(done.err.strip().splitlines()) <= 2
    assert len(messages(db)) - count <= 1
