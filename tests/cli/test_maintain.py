"""``delete``, ``rename``, ``prune``, ``vacuum``, ``verify``, ``copy``, as a user runs them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.records import Status, TurnEnd
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.cli.commands import Done, Oki, start
from tests.store.stores import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The store that the commands work on, with two conversations."""
    db = tmp_path / "oki_trace.db"
    rng = np.random.default_rng(0)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        made = Store(str(db), writer, reader)
        for _ in range(2):
            _, message = made.reply("half")
            writer.append(message, [builders.coherent_step(i, rng) for i in range(3)])
            writer.finish_reply(message, TurnEnd(Status.COMPLETE, "x", "end", 1.0))
        yield made


def shown(done: Done) -> Any:
    assert (done.status, done.err) == (0, ""), done
    return json.loads(done.out)


def numbers(store: Store) -> list[int]:
    return sorted(c.id for c in store.reader.conversations())


def test_rename(oki: Oki, store: Store) -> None:
    assert oki("rename", 1, " Käse \x1b[31m ") == Done(0, "", "")
    assert store.reader.conversation(1).title == "Käse \x1b[31m"
    assert oki("rename", 1, " ").status == 2
    assert "no conversation 9" in oki("rename", 9, "x").err


def test_delete(oki: Oki, store: Store) -> None:
    refused = oki("delete", 1)
    assert refused.status == 2 and "Add --yes" in refused.err
    assert "no conversation 9" in oki("delete", 1, 9, "--yes").err
    assert numbers(store) == [1, 2], "all or none"
    assert shown(oki("delete", 1, 1, "--yes", "--json")) == {"deleted": [1]}
    assert numbers(store) == [2]
    store.reply("none")
    live = oki("delete", 3, "--yes")
    assert live.status == 1 and "is being generated" in live.err and len(live.err.splitlines()) == 1
    assert oki("delete", 2, "-y").out == "Deleted 1 conversation.\n"


def test_prune(oki: Oki, store: Store) -> None:
    for wrong in ([], ["--older-than", "soon"], ["--max-size", "much"], ["--older-than", "9" * 30]):
        assert oki("prune", *wrong).status == 2
    assert oki("prune", "--older-than", "1d").out == "Nothing to prune.\n"
    told = oki("prune", "--max-size", "0 MB", "--dry-run").out
    assert "Pruning 2 replies would free" in told and "--all deletes whole conversations" in told
    assert store.reader.info().tensor_steps == 6
    refused = oki("prune", "--max-size", "0")
    assert refused.status == 2 and "Add --yes" in refused.err
    done = shown(oki("prune", "--max-size", "0", "--yes", "--json"))
    assert (done["dry_run"], done["tensors_only"], done["spared"]) == (False, True, 0)
    assert [item["message"] for item in done["items"]] == [1, 2]
    assert done["frees_bytes"] == sum(item["bytes"] for item in done["items"]) > 0
    assert store.reader.info().tensor_bytes == 0 and store.reader.info().steps == 6
    out = oki("prune", "--older-than", "0h", "--all", "--yes").out
    assert "Pruning 2 conversations would free" in out and "oki-trace vacuum" in out
    assert numbers(store) == []


def test_vacuum(oki: Oki, store: Store) -> None:
    store.writer.delete_conversation(2)
    done = shown(oki("vacuum", "--json"))
    assert done["after"] < done["before"]
    assert "Reclaimed" in oki("vacuum").out
    store.reply("none")
    refused = oki("vacuum")
    assert refused.status == 1 and "Let it finish, or stop it first" in refused.err


def test_verify_finds_what_is_changed(oki: Oki, store: Store) -> None:
    good = oki("verify")
    assert good == Done(0, "Checked 2 messages, 6 steps, 18 tensors. No problems found.\n", "")
    with closing(sqlite3.connect(store.db)) as connection:
        connection.execute("UPDATE step SET prob = 0.5 WHERE id = 5")
        connection.commit()
    bad = oki("verify")
    assert bad.status == 1 and bad.err == ""
    assert bad.lines[0].startswith("conversation 2, message 2, step 1: its probability 0.5")
    assert bad.lines[-1].endswith(f"{len(bad.lines) - 1} problems found.")
    assert oki("verify", 1).status == 0
    found = json.loads(oki("verify", 2, "--json").out)
    assert found["checked"] == {"messages": 1, "steps": 3, "tensors": 9, "without_digest": 0}
    assert {(f["conversation_id"], f["step_index"]) for f in found["findings"]} == {(2, 1)}
    assert "no conversation 9" in oki("verify", 9).err


def test_a_model_that_is_gone_is_told_and_is_no_fault(oki: Oki, store: Store) -> None:
    with closing(sqlite3.connect(store.db)) as connection:
        connection.execute("""UPDATE message SET choice = '{"model_id": "./gone/model"}'""")
        connection.commit()
    done = oki("verify", "--recompute")
    assert "message 1: not recomputed with tiny/model: There is no ./gone/model here" in done.out
    # What was changed to make it gone is found, and nothing else.
    found = json.loads(oki("verify", "--recompute", "--json").out)["findings"]
    assert all("its text, settings, prompt" in one["what"] for one in found)


def test_verify_runs_a_real_model_again(oki: Oki, small: Path, tmp_path: Path) -> None:
    for options in (["--temperature", "1", "--seed", "4"], ["--tensors", "compact"]):
        run = ["run", "the quick fox", "--model", small, "--dtype", "float32"]
        assert oki(*run, "--max-new-tokens", "6", *options).status == 0
    done = json.loads(oki("verify", "--recompute", "--json").out)
    assert done["findings"] == []
    assert len(done["recomputed"]) == 2
    for one in done["recomputed"]:
        assert one["reason"] is None and one["agrees"] and one["steps"] > 0
        assert one["logprob_difference"] < 1e-3 and one["top1_differences"] == 0
        assert one["lens_difference"] < 1e-3 and one["entropy_difference"] < 1e-3
        assert one["not_numbers"] == 0
    file = tmp_path / "oki_trace.db"
    kept = file.read_bytes()
    for change, told in (
        ("lens_entry SET prob = prob / 2 WHERE layer = 1 AND rank = 1", "more than rounding"),
        ("topk_entry SET logit = logit - 3 WHERE rank = 4", "more than rounding"),
        ("step SET entropy = entropy + 1", "more than rounding"),
        ("step SET entropy = NULL WHERE step_index = 2", "1 value not a number"),
        ("lens_layer SET chosen_prob = NULL WHERE layer = 1", "values not a number"),
    ):
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute(f"UPDATE {change}")
        changed = oki("verify", "--recompute")
        assert changed.status == 1 and told in changed.out, (change, changed.out)
        file.write_bytes(kept)
    with closing(sqlite3.connect(tmp_path / "oki_trace.db")) as connection:
        connection.execute("UPDATE step SET token_id = (token_id + 7) % 290 WHERE step_index = 1")
        connection.commit()
    changed = oki("verify", "--recompute")
    assert changed.status == 1 and "more than rounding explains" in changed.out


def test_copy_there_and_back(oki: Oki, store: Store, tmp_path: Path) -> None:
    other = tmp_path / "other" / "store.db"
    done = shown(oki("copy", 2, "--to", other, "--json"))
    assert done == [{"conversation": 2, "new": 1, "fate": "copied", "steps": 3}]
    lines = oki("copy", "--to", other).lines
    assert lines == [
        "conversation 1: copied as 2 (3 steps)",
        "conversation 2: already there as 1 (3 steps)",
        f"Copied 1 conversation to {other}.",
    ]
    assert oki("verify", "--db", other).status == 0
    assert "into itself" in oki("copy", "--to", store.db).err


@pytest.mark.parametrize("command", [["delete", 1, "-y"], ["vacuum"], ["verify"],
                                     ["prune", "--older-than", "1d"], ["rename", 1, "x"],
                                     ["copy", "--to", "x.db"]])  # fmt: skip
def test_none_of_them_makes_a_store(oki: Oki, command: list[str], tmp_path: Path) -> None:
    done = oki(*command, "--db", tmp_path / "none.db")
    assert done.status == 1 and "There is no trace store" in done.err
    assert not (tmp_path / "none.db").exists()


def test_no_password_is_printed() -> None:
    address = "postgresql://me:s3cret@127.0.0.1:9/traces"
    for command in (["info"], ["migrate"], ["vacuum"], ["verify"], ["delete", "1", "-y"]):
        done = start(*command, "--db", address)
        assert done.status == 1 and "the server does not answer" in done.err
        assert "s3cret" not in done.out + done.err
