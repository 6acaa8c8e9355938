"""One set of rules for all formats, and whatever passes them can be used.

A value that one format refuses is refused by every one in the same sentence.
What is accepted is shown, verified, asked of, exported in every format and
imported again with the same rows, whatever was changed in it.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oki_trace import records
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_path
from oki_trace.exchange.reading import validation
from oki_trace.exchange.tables import TABLES
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.maintenance.prune import plan, prune
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.cli.commands import Oki
from tests.cli.conftest import oki
from tests.exchange.inline import import_inline
from tests.exchange.stories import HOSTILE, v1_trace
from tests.exchange.test_fuzz_documents import places, quick
from tests.exchange.usable import FORMATS, ask_all, check_usable, comes_back, outcome, rows

__all__ = ["oki"]

Json = Any


def fill(db: Path, *, steps: int = 1, mode: str = "half") -> Path:
    """A question and a reply whose every number follows from its tensors."""
    rng = np.random.default_rng(11)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation(f"About {HOSTILE}")
        writer.add_message(conversation, ChatMessage(Role.USER, "hello"))
        policy = CapturePolicy(tensors=mode)  # type: ignore[arg-type]
        reply = writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(16, 0.7, seed=3), policy, claim=True
        )
        writer.start_reply(reply, builders.turn_start(mode))  # type: ignore[arg-type]
        made = [builders.coherent_step(index, rng) for index in range(steps)]
        why = builders.decision(made[0].token_id, made[0].token_id + 1)
        writer.append(reply, [replace(step, decision=why) for step in made])
        end = TurnEnd(Status.COMPLETE, " the" * steps, "end of turn", 1.5)
        writer.finish_reply(reply, end)
    return db


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the exports: ``x.json``, ``v1.json`` and ``tables``."""
    folder = tmp_path_factory.mktemp("exported")
    with TraceReader(fill(folder / "s.db")) as reader:
        export(reader, 1, Format.JSON, folder / "x.json", sys.stdout)
        export(reader, 1, Format.PARQUET, folder / "tables", sys.stdout)
    (folder / "v1.json").write_text(json.dumps(v1_trace(2)))
    return folder


# ------------------------------------------------------------- the same everywhere


def as_lines(document: Json) -> str:
    """The document as JSON lines have it."""
    document = copy.deepcopy(document)
    steps = []
    for message in document["messages"]:
        message.get("trace", {}).pop("prompt_steps", None)
        for step in message.get("trace", {}).pop("steps", ()):
            steps.append({"message": message["id"], **step})
    return "\n".join(map(json.dumps, [{**document, "layout": "jsonl"}, *steps]))


def edited_table(exported: Path, into: Path, name: str, edit: Callable[[Json], object]) -> Path:
    into.mkdir()
    for file in (exported / "tables").iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    table = pq.read_table(into / f"{name}.parquet").to_pylist()
    edit(table)
    pq.write_table(pa.Table.from_pylist(table, schema=TABLES[name]), into / f"{name}.parquet")
    return into


def the_step(document: Json) -> Json:
    return document["messages"][1]["trace"]["steps"][0]


def in_document(name: str, **values: Any) -> Callable[[Json], object]:
    """Change some fields of the JSON text in a cell."""

    def edit(table: Json) -> None:
        row = next(row for row in table if row[name])
        row[name] = json.dumps({**json.loads(row[name]), **values})

    return edit


# The change in JSON, the table and its change in Parquet, and the sentence.
SAME: dict[str, tuple[Callable[[Json], object], str, Callable[[Json], object], str]] = {
    "a probability above 1": (
        lambda d: the_step(d)["logits_topk"][1].update(prob=1.5),
        *("topk_entry", lambda r: r[1].update(prob=1.5)),
        "message 2, step 0, logits_topk 2: prob is above 1.001",
    ),
    "a step's probability below 0": (
        lambda d: the_step(d).update(prob=-0.5),
        *("step", lambda r: r[0].update(prob=-0.5)),
        "message 2, step 0: prob is below 0",
    ),
    "a number beyond 32 bits": (
        lambda d: the_step(d).update(entropy=1e300),
        *("step", lambda r: r[0].update(entropy=1e300)),
        "message 2, step 0: entropy is too large a number",
    ),
    "candidates out of order": (
        lambda d: the_step(d)["logits_topk"][0].update(prob=0.0, logit=None),
        *("topk_entry", lambda r: r[0].update(prob=0.0, logit=None)),
        "message 2, step 0, logits_topk: its entries are not in the order of their prob",
    ),
    "ranks that are no ranks": (
        lambda d: the_step(d)["logits_topk"][1].update(rank=1),
        *("topk_entry", lambda r: r[1].update(rank=1)),
        "message 2, step 0, logits_topk: the ranks of its entries are not 1, 2, 3 and so on",
    ),
    "a look ahead": (
        lambda d: the_step(d)["attention"][0]["topk"][0].update(position=6),
        *("attention_entry", lambda r: r[0].update(position=6)),
        "message 2, step 0: attention reaches position 6, but it is at 6",
    ),
    "attention of a layer that was not announced": (
        lambda d: d["messages"][1]["trace"]["capture"].update(attention_layers=[1, 2]),
        *("message", in_document("capture", attention_layers=[1, 2])),
        "attention has layers that capture does not list",
    ),
    "another step": (
        lambda d: the_step(d).update(step=1),
        *("step", lambda r: r[0].update(step_index=1)),
        "message 2, step 0: it is not step 0: steps are missing or out of order",
    ),
    "a long token": (
        lambda d: the_step(d).update(chosen_token="a" * 10_001),
        *("step", lambda r: r[0].update(token="a" * 10_001)),
        "message 2, step 0: chosen_token is longer than 10,000 characters",
    ),
    "a status that is none": (
        lambda d: d["messages"][1].update(status="dancing"),
        *("message", lambda r: r[1].update(status="dancing")),
        "message 2: status is 'dancing', which is none of",
    ),
    "a user's message with a trace": (
        lambda d: d["messages"][1].update(role="user"),
        *("message", lambda r: r[1].update(role="user")),
        "message 2: a user message has a trace",
    ),
    "a time that took no time": (
        lambda d: d["messages"][1].update(seconds=-1.0),
        *("message", lambda r: r[1].update(seconds=-1.0)),
        "message 2: seconds is below 0",
    ),
    "a step too few": (
        lambda d: d["messages"][1].update(tokens=2),
        *("message", lambda r: r[1].update(tokens=2)),
        "message 2 has 1 of its 2 steps",
    ),
    "settings out of range": (
        lambda d: d["messages"][1]["sampling"].update(temperature=1000),
        *("message", in_document("sampling", temperature=1000)),
        "message 2: sampling is invalid: temperature must be 0 to 100",
    ),
    "a seed beyond 64 bits": (
        lambda d: d["messages"][1]["trace"]["generation"].update(seed=2**63),
        *("message", in_document("generation", seed=2**63)),
        "message 2, trace, generation: seed is not below 9,223,372,036,854,775,808",
    ),
    "a decision that says nothing": (
        lambda d: the_step(d).update(decision={"drawn": True}),
        *("step", lambda r: r[0].update(decision='{"drawn": true}')),
        "message 2, step 0, decision: candidates is missing",
    ),
    "a thousand layers": (
        lambda d: d["messages"][1]["trace"]["capture"].update(layers=1001),
        *("message", in_document("capture", layers=1001)),
        "message 2, trace, capture: layers is above 1,000",
    ),
    "a segment that is none": (
        lambda d: d["messages"][1]["trace"]["prompt_segments"].__setitem__(0, "x"),
        *("prompt_token", lambda r: r[0].update(segment="x")),
        "message 2, trace: prompt_segments 1 is 'x', which is none of",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_refuses_it_in_the_same_sentence(
    name: str, exported: Path, tmp_path: Path
) -> None:
    edit, table, edit_table, sentence = SAME[name]
    document = json.loads((exported / "x.json").read_text())
    edit(document)
    # What repeats another field follows it.
    for step in document["messages"][1]["trace"]["steps"]:
        step.pop("evidence")
    (tmp_path / "x.json").write_text(json.dumps(document))
    (tmp_path / "x.jsonl").write_text(as_lines(document))
    tables = edited_table(exported, tmp_path / "tables", table, edit_table)
    refusals = {
        outcome(path, tmp_path / "t.db")
        for path in (tmp_path / "x.json", tmp_path / "x.jsonl", tables)
    }
    assert len(refusals) == 1, refusals
    assert sentence in str(refusals.pop())


def test_the_changes_are_of_what_would_be_accepted(exported: Path, tmp_path: Path) -> None:
    """The same files without a change: so each is refused for its change alone."""
    document = json.loads((exported / "x.json").read_text())
    (tmp_path / "x.jsonl").write_text(as_lines(document))
    for path in (exported / "x.json", tmp_path / "x.jsonl", exported / "tables"):
        assert outcome(path, tmp_path / "t.db") is None


def test_every_name_that_is_written_is_read(exported: Path) -> None:
    """But for those that repeat another, which docs/formats.md lists."""
    document = json.loads((exported / "x.json").read_text())
    message = document["messages"][1]
    trace = message["trace"]
    step = trace["steps"][0]
    pairs: list[tuple[Json, type[Any], set[str]]] = [
        (document, validation.Document, {"conversation", "messages"}),
        (document["conversation"], validation.Conversation, set()),
        (message, validation.Message, {"trace"}),
        (trace, validation.Trace, {"steps", "prompt_steps"}),
        (trace["generation"], records.Generation, set()),
        (trace["capture"], records.CaptureReport, set()),
        (step, validation.Step, set()),
        (step["decision"], validation.Decision, {"text", "differs_from_greedy"}),
        (step["decision"]["greedy"], validation.Contender, set()),
        (step["decision"]["processors"][0], records.Effect, set()),
        (step["logits_topk"][0], validation.Candidate, set()),
        (step["evidence"][0], validation.Evidence, {"token_id", "in_prompt"}),
        (step["attention"][0], validation.AttentionLayer, set()),
        (step["attention"][0]["topk"][0], validation.Attended, set()),
        (step["logit_lens"][0], validation.LensLayer, set()),
        (step["logit_lens"][0]["topk"][0], validation.LensToken, set()),
    ]
    for written, kind, more in pairs:
        assert set(written) - more <= set(kind.__annotations__), kind


# --------------------------------------------------------------- what is accepted


VALUES = [
    *(None, True, -1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400),
    *(-0.0, 0.5, 1.0, 1.5, -0.5, 1e-320, 1e-7, 1e38, 1e300),
    *("", "\x00", "\x1b[31m\u202e", "a" * 20_000, "0" * 11, "\ud800", "half", "none", "running"),
    *("1969-12-31T00:00:00", "9999-12-31T23:59:59+00:00", "2024-01-01", "user", "system"),
    *([], {}, [None], [[]], [1], ["x"], {"a": 1}),
]


def mutate(document: Json, data: st.DataObject) -> None:
    """One or two values replaced, dropped or doubled."""
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(places(document)))
        holder = document
        for key in where[:-1]:
            holder = holder[key]
        how = data.draw(st.sampled_from(["value", "value", "value", "drop", "double"]))
        if how == "value":
            holder[where[-1]] = data.draw(st.sampled_from(VALUES))
        elif how == "double" and isinstance(holder, list):
            holder.insert(where[-1], holder[where[-1]])
        else:
            del holder[where[-1]]


@quick
@given(data=st.data())
def test_a_changed_export_is_refused_or_usable(
    data: st.DataObject, exported: Path, tmp_path_factory: pytest.TempPathFactory, oki: Oki
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    source = data.draw(st.sampled_from(["x.json", "lines", "v1.json"]))
    name = "v1.json" if source == "v1.json" else "x.json"
    document = json.loads((exported / name).read_text())
    mutate(document, data)
    try:
        text = as_lines(document) if source == "lines" else json.dumps(document)
    except (TypeError, KeyError, AttributeError):
        return  # no document any more that lines could be made of
    (folder / "x.json").write_text(text)
    if outcome(folder / "x.json", folder / "t.db") is None:
        check_usable(folder / "t.db", folder, oki)


@pytest.mark.parametrize("name", ["x.json", "v1.json", "tables"])
def test_an_export_is_usable_as_it_is(name: str, exported: Path, tmp_path: Path, oki: Oki) -> None:
    assert outcome(exported / name, tmp_path / "t.db") is None
    check_usable(tmp_path / "t.db", tmp_path, oki)
    ask_all(tmp_path / "t.db", oki)


def without_numbers(step: Json) -> None:
    """Not one number is known; of the decision only what has to be."""
    for value in step.values():
        for entry in value if isinstance(value, list) else ():
            entry.update(
                {k: None for k, v in entry.items() if type(v) in (int, float)}
                | {k: entry[k] for k in ("layer", "position") if k in entry}
            )
            for inner in entry.get("topk", ()):
                inner.update({k: None for k in inner if k not in ("token", "position")})
    step.update({k: None for k, v in step.items() if type(v) in (int, float)})
    greedy = {"token": "a"}
    step["decision"] = {
        "drawn": True,
        "candidates": 3,
        "greedy": greedy,
        "runner_up": greedy,
        "processors": [{"name": "top-p", "setting": "0.9", "removed": 0}],
    }


@pytest.mark.parametrize("name", ["x.json", "v1.json"])
def test_a_reply_whose_numbers_are_all_missing_is_usable(
    name: str, exported: Path, tmp_path: Path, oki: Oki
) -> None:
    document = json.loads((exported / name).read_text())
    trace = document["messages"][1]["trace"] if name == "x.json" else document
    for step in trace["steps"]:
        without_numbers(step)
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert outcome(tmp_path / "x.json", tmp_path / "t.db") is None
    check_usable(tmp_path / "t.db", tmp_path, oki)
    ask_all(tmp_path / "t.db", oki)


def test_infinities_and_zeros_below_zero_in_tables_are_usable(
    exported: Path, tmp_path: Path, oki: Oki
) -> None:
    def odd(table: Json) -> None:
        for row in table:
            row.update({k: -np.inf for k in ("logit", "noise", "kl", "entropy") if k in row})
            row.update({k: np.inf for k in ("kl", "entropy") if k in row})
            row.update({k: -0.0 for k in ("prob", "weight", "missing", "sampled_prob") if k in row})

    folder = exported / "tables"
    for name in ("step", "topk_entry", "attention_layer", "attention_entry", "lens_layer"):
        folder = edited_table(folder.parent, tmp_path / f"tables-{name}", name, odd)
        (tmp_path / name).mkdir()
        folder = folder.rename(tmp_path / name / "tables")
    assert outcome(folder, tmp_path / "t.db") is None
    check_usable(tmp_path / "t.db", tmp_path, oki)
    ask_all(tmp_path / "t.db", oki)


# ------------------------------------------------------------- tensors that are not there


def findings(db: Path) -> list[str]:
    with TraceReader(db) as reader:
        return [str(finding) for finding in Verification(reader)]


@pytest.mark.parametrize("format", [Format.JSON, Format.JSONL])
def test_an_export_without_its_tensors_verifies_and_says_so(
    format: Format, tmp_path: Path, oki: Oki
) -> None:
    source = fill(tmp_path / "s.db", steps=3)
    assert findings(source) == []
    with TraceReader(source) as reader:
        export(reader, 1, format, tmp_path / "x", sys.stdout)
    import_path(tmp_path / "x", tmp_path / "t.db")
    assert findings(tmp_path / "t.db") == []
    assert "tensors left out of the export" in oki("show", 1, "--db", tmp_path / "t.db").out
    with TraceReader(tmp_path / "t.db") as reader:
        (reply,) = [m for m in reader.messages(1) if m.capture]
        assert reply.capture is not None and reply.capture.tensors_left_out
        with pytest.raises(Exception, match="left out of the export"):
            reader.tensor(reply.id, 0, "logits")
    comes_back(tmp_path / "t.db", 1, tmp_path)


@pytest.mark.parametrize("format", list(FORMATS))
def test_an_export_of_a_pruned_reply_verifies_and_says_so(
    format: Format, tmp_path: Path, oki: Oki
) -> None:
    source = fill(tmp_path / "s.db", steps=3)
    with TraceReader(source) as reader, TraceWriter(source) as writer:
        prune(writer, plan(reader, max_bytes=0, tensors_only=True))
    with TraceReader(source) as reader:
        export(reader, 1, format, tmp_path / "x", sys.stdout)
        pruned = reader.messages(1)[1].tensors_pruned_at
    import_inline(tmp_path / "x", tmp_path / "t.db")
    assert findings(source) == findings(tmp_path / "t.db") == []
    assert re.search(r"tensors pruned on \d{4}", oki("show", 1, "--db", tmp_path / "t.db").out)
    with TraceReader(tmp_path / "t.db") as reader:
        assert reader.messages(1)[1].tensors_pruned_at == pruned is not None
    assert rows(source) == rows(tmp_path / "t.db")


def test_tensors_that_were_taken_away_are_still_a_fault(tmp_path: Path) -> None:
    """The file does not say that they were left out."""
    with TraceReader(fill(tmp_path / "s.db", steps=3)) as reader:
        export(reader, 1, Format.PARQUET, tmp_path / "tables", sys.stdout)
    changed = edited_table(tmp_path, tmp_path / "y", "tensor", lambda table: table.clear())
    import_inline(changed, tmp_path / "t.db")
    assert len(findings(tmp_path / "t.db")) == 3


def test_tensors_are_there_with_them(tmp_path: Path) -> None:
    with TraceReader(fill(tmp_path / "s.db")) as reader:
        export(reader, 1, Format.JSON, tmp_path / "x.json", sys.stdout, tensors=True)
    import_inline(tmp_path / "x.json", tmp_path / "t.db")
    assert findings(tmp_path / "t.db") == []
    with TraceReader(tmp_path / "t.db") as reader:
        capture = reader.messages(1)[1].capture
        assert capture is not None and not capture.tensors_left_out
