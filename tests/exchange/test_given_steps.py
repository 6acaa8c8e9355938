"""The steps of given tokens: every format holds them, and an import checks them as others."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oki_trace.errors import ExchangeError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.json_export import conversation_object
from oki_trace.exchange.tables import TABLES
from oki_trace.records import TensorMode
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from tests.exchange import stories
from tests.exchange.inline import import_inline as import_path
from tests.exchange.test_round_trip import NAMES, content, write

Json = Any
# Of the reply (message 2) and of the scored text (message 3).
GIVEN = {2: [3, 4, 5], 3: list(range(1, 70))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    db = tmp_path_factory.mktemp("given") / "s.db"
    stories.fill_given(db)
    return db


@pytest.fixture
def document(source: Path, tmp_path: Path) -> Json:
    file = write(source, tmp_path / "document", Format.JSON, tensors=False)
    return json.loads(file.read_text())


@pytest.mark.parametrize("tensors", ["half", "exact", "none"])
@pytest.mark.parametrize("format", list(NAMES))
def test_they_come_back_byte_for_byte(format: Format, tensors: TensorMode, tmp_path: Path) -> None:
    stories.fill_given(tmp_path / "source.db", tensors=tensors)
    first = write(tmp_path / "source.db", tmp_path / "one", format)
    imported = import_path(first, tmp_path / "target.db")
    assert (imported.messages, imported.steps, imported.changed) == (3, 3 + 3 + 69, 0)
    write(tmp_path / "target.db", tmp_path / "two", format)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with TraceReader(tmp_path / "source.db") as one, TraceReader(tmp_path / "target.db") as two:
        for message, positions in GIVEN.items():
            for at in positions:
                names = one.tensor_names(message, at, given=True)
                assert bool(names) == (tensors != "none")
                assert two.tensor_names(message, at, given=True) == names
                for name in names:
                    left = one.tensor(message, at, name, given=True)
                    right = two.tensor(message, at, name, given=True)
                    assert np.array_equal(left.array, right.array)
                    assert (left.layers, left.key_offset) == (right.layers, right.key_offset)


@pytest.mark.parametrize("format", list(NAMES))
def test_their_records_are_those_of_the_store(format: Format, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.db"
    import_path(write(source, tmp_path / "one", format), target)
    with TraceReader(source) as one, TraceReader(target) as two:
        assert conversation_object(one, 1) == conversation_object(two, 1)
        for message, positions in GIVEN.items():
            steps = list(two.iter_steps(message, given=True))
            assert [(step.position, step.step_index) for step in steps] == [
                (at, -1) for at in positions
            ]
            assert two.message(message).capture == one.message(message).capture
            assert {step.origin for step in steps} == {"given"}
        assert [step.origin for step in two.iter_steps(2)] == ["forced", "sampled", "sampled"]
        assert not [str(f) for f in Verification(two) if "digest" in str(f)]


def test_where_each_format_has_them(source: Path, document: Json, tmp_path: Path) -> None:
    for message in document["messages"][1:]:
        trace = message["trace"]
        assert [*trace][-2:] == ["steps", "prompt_steps"]
        assert [step["position"] for step in trace["prompt_steps"]] == GIVEN[message["id"]]
        assert {(step["step"], step["origin"]) for step in trace["prompt_steps"]} == {
            (None, "given")
        }
        assert [step["step"] for step in trace["steps"]] == list(range(message["tokens"]))
    lines = write(source, tmp_path / "one", Format.JSONL).read_text().splitlines()[1:]
    assert [json.loads(line)["origin"] for line in lines] == [
        *("given" for _ in GIVEN[2]),
        *("forced", "sampled", "sampled"),
        *("given" for _ in GIVEN[3]),
    ]
    tables = write(source, tmp_path / "two", Format.PARQUET)
    rows = pq.read_table(tables / "step.parquet").to_pylist()
    assert [row["step_index"] for row in rows] == [None] * 3 + [0, 1, 2] + [None] * 69
    output = io.StringIO()
    with TraceReader(source) as reader:
        export(reader, 1, Format.TRACE_V1, None, output)
    assert [len(trace["steps"]) for trace in json.loads(output.getvalue())] == [3, 0]


def test_progress_counts_them_and_a_format_without_them_says_so(
    source: Path, tmp_path: Path
) -> None:
    for format, steps in ((Format.JSON, 75), (Format.HTML, 75), (Format.TRACE_V1, 3)):
        seen: list[tuple[int, int]] = []
        told: list[str] = []
        with TraceReader(source) as reader:
            export(
                *(reader, 1, format, tmp_path / format, sys.stdout),
                progress=lambda done, total, seen=seen: seen.append((done, total)),  # type: ignore[misc]
                tell=told.append,
            )
        assert seen[-1] == (steps, steps)
        assert any("72 given tokens are left out" in line for line in told) == (steps == 3)


def test_a_file_from_before_origins(document: Json, tmp_path: Path) -> None:
    """Neither the lists nor the fields that came with given tokens."""
    for message in document["messages"][1:]:
        trace = message["trace"]
        del trace["prompt_steps"], trace["capture"]["windows"]
        del trace["capture"]["policy"]["trace_prompt"], message["policy"]["trace_prompt"]
        for step in trace["steps"]:
            del step["origin"]
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert import_path(tmp_path / "x.json", tmp_path / "t.db").steps == 3
    with TraceReader(tmp_path / "t.db") as reader:
        assert [step.origin for step in reader.iter_steps(2)] == ["sampled"] * 3
        assert reader.message(2).policy.trace_prompt is None  # type: ignore[union-attr]


def test_the_lists_may_come_in_either_order(document: Json, tmp_path: Path) -> None:
    whole = copy.deepcopy(document)
    for message in document["messages"][1:]:
        message["trace"]["steps"] = message["trace"].pop("steps")
    (tmp_path / "x.json").write_text(json.dumps(document))
    import_path(tmp_path / "x.json", tmp_path / "t.db")
    again = write(tmp_path / "t.db", tmp_path / "again", Format.JSON, tensors=False)
    assert json.loads(again.read_text()) == whole


def test_a_list_of_given_tokens_alone_may_have_its_steps_in_lines(
    document: Json, tmp_path: Path
) -> None:
    """The file says that it has lines only after its messages."""
    head, *lines = lines_of(document).splitlines()
    values = json.loads(head)
    for message in values["messages"][1:]:
        message["trace"]["prompt_steps"] = []
    values["layout"] = values.pop("layout")
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(values), *lines]))
    assert import_path(tmp_path / "x.jsonl", tmp_path / "t.db").steps == 75


# --------------------------------------------------------------------------- refused


def lines_of(document: Json) -> str:
    document = copy.deepcopy(document)
    lines = []
    for message in document["messages"][1:]:
        for name in ("prompt_steps", "steps"):
            lines += [{"message": message["id"], **s} for s in message["trace"].pop(name)]
    return "\n".join(map(json.dumps, [{**document, "layout": "jsonl"}, *lines]))


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "before the first": ({"position": 0}, "position is not that of a prompt token after the first"),
    "after the prompt": ({"position": 6}, "position is not that of a prompt token after the first"),
    "nowhere": ({"position": None}, "position is not that of a prompt token after the first"),
    "twice": ({"position": 4}, "positions are not in ascending order"),
    "another token": ({"chosen_id": 7}, "it is not the prompt's token at position 5"),
    "a number": ({"step": 2}, "a given token has no step number and no decision"),
    "a far position": ({"position": 2**40}, "position"),
    "a wrong kind": ({"position": "5"}, "position"),
    "attention ahead": (
        {"attention": [{"layer": 1, "topk": [{"position": 5}]}], "evidence": None},
        "attention reaches position 5",
    ),
    "ranks": ({"logits_topk": [{"rank": 2, "token": "x"}]}, "ranks of its entries are not 1"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("as_lines", [False, True], ids=["json", "jsonl"])
def test_what_cannot_be(name: str, as_lines: bool, document: Json, tmp_path: Path) -> None:
    values, sentence = EDITS[name]
    document["messages"][1]["trace"]["prompt_steps"][2] |= values
    file = tmp_path / ("x.jsonl" if as_lines else "x.json")
    file.write_text(lines_of(document) if as_lines else json.dumps(document))
    with pytest.raises(ExchangeError, match=r"message 2, prompt step 2.*" + sentence):
        import_path(file, tmp_path / "t.db")
    assert not (tmp_path / "t.db").exists()


COLUMNS = {"position": "position", "chosen_id": "token_id", "step": "step_index"}


@pytest.mark.parametrize(
    "name", ["before the first", "after the prompt", "twice", "another token", "a number"]
)
def test_what_cannot_be_in_tables(name: str, source: Path, tmp_path: Path) -> None:
    values, sentence = EDITS[name]
    tables = write(source, tmp_path / "one", Format.PARQUET)
    rows = pq.read_table(tables / "step.parquet").to_pylist()
    rows[2] |= {COLUMNS[field]: value for field, value in values.items()}
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES["step"]), tables / "step.parquet")
    with pytest.raises(ExchangeError, match=r"message 2, prompt step 2.*" + sentence):
        import_path(tables, tmp_path / "t.db")


def a_decision(document: Json) -> None:
    decision = {"drawn": False, "candidates": 1, "greedy": {"token": "x"}}
    document["messages"][1]["trace"]["prompt_steps"][0]["decision"] = decision


def in_the_wrong_list(document: Json) -> None:
    document["messages"][1]["trace"]["steps"][0]["origin"] = "given"


def sampled_in_the_prompt(document: Json) -> None:
    document["messages"][1]["trace"]["prompt_steps"][0]["origin"] = "sampled"


def an_origin_of_no_kind(document: Json) -> None:
    document["messages"][1]["trace"]["prompt_steps"][0]["origin"] = "guessed"


def no_list(document: Json) -> None:
    document["messages"][1]["trace"]["prompt_steps"] = {"position": 3}


def windows_of_three(document: Json) -> None:
    document["messages"][2]["trace"]["capture"]["windows"] = [1, 2, 3]


def an_unknown_level(document: Json) -> None:
    document["messages"][1]["policy"]["trace_prompt"] = "some"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (a_decision, "no step number and no decision"),
        (in_the_wrong_list, "message 2, step 0: its origin cannot be 'given'"),
        (sampled_in_the_prompt, "message 2, prompt step 0: its origin cannot be 'sampled'"),
        (an_origin_of_no_kind, "origin"),
        (no_list, "prompt_steps is not a list"),
        (windows_of_three, "windows"),
        (an_unknown_level, "trace_prompt"),
    ],
)
def test_what_a_document_cannot_hold(
    edit: Callable[[Json], None], sentence: str, document: Json, tmp_path: Path
) -> None:
    edit(document)
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(ExchangeError, match=sentence):
        import_path(tmp_path / "x.json", tmp_path / "t.db")


def test_the_limit_counts_both(
    document: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oki_trace.exchange.reading import validation

    (tmp_path / "x.json").write_text(json.dumps(document))
    monkeypatch.setattr(validation, "MAX_STEPS", 5)
    with pytest.raises(ExchangeError, match="message 2 has more than 5 steps"):
        import_path(tmp_path / "x.json", tmp_path / "t.db")
