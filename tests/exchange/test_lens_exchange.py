"""Readings by installed lenses and experts in files: both ways, from older files, and hostile."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from oki_trace.errors import OkiTraceError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.reading import validation
from oki_trace.records import CapturePolicy, ChatMessage, ModelChoice, Role, Sampling, Step
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.exchange.inline import import_inline
from tests.store.stores import DONE, assert_same

FORMATS = (Format.JSON, Format.JSONL, Format.PARQUET)


@pytest.fixture(scope="module")
def written() -> list[Step]:
    """The second step is read by the Logit Lens alone."""
    rng = np.random.default_rng(4)
    steps = [builders.coherent_step(index, rng) for index in range(3)]
    return [step if index == 1 else builders.read_by(step, rng) for index, step in enumerate(steps)]


@pytest.fixture(scope="module")
def exports(written: list[Step], tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    folder = tmp_path_factory.mktemp("lenses")
    db = folder / "store.db"
    policy = CapturePolicy(tensors="none")
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("What is gold?")
        writer.add_message(conversation, ChatMessage(Role.USER, "What is gold?"))
        choice = ModelChoice("tiny/model")
        reply = writer.queue_reply(conversation, choice, Sampling(), policy, claim=True)
        writer.start_reply(reply, builders.turn_start("none"))
        writer.append(reply, written)
        writer.finish_reply(reply, DONE)
    files = {format: folder / f"{format}.file" for format in FORMATS}
    with TraceReader(db) as reader:
        for format, file in files.items():
            export(reader, 1, format, file, sys.stdout)
    return files


@pytest.mark.parametrize("format", FORMATS)
def test_every_reading_comes_back(
    format: Format, exports: dict[Format, Path], written: list[Step], tmp_path: Path
) -> None:
    db = tmp_path / "target.db"
    done = import_inline(exports[format], db)
    assert (done.changed, done.without_digest) == (0, 0)
    with TraceReader(db) as reader:
        for step in written:
            assert_same(reader.step(2, step.step_index), step)
        assert list(Verification(reader)) == []
        export(reader, 1, format, tmp_path / "again", sys.stdout)
    again = tmp_path / "again"
    for file in [exports[format]] if again.is_file() else exports[format].iterdir():
        same = again if again.is_file() else again / file.name
        assert same.read_bytes() == file.read_bytes()


def test_a_step_names_its_lenses_and_has_none_where_there_are_none(
    exports: dict[Format, Path],
) -> None:
    steps = trace(json.loads(exports[Format.JSON].read_text()))["steps"]
    assert [list(step.get("lenses", [])) for step in steps] == [
        ["jlens", "tuned-1.0"],
        [],
        ["jlens", "tuned-1.0"],
    ]
    assert [row["layer"] for row in steps[0]["lenses"]["jlens"]] == [1, 3]
    assert steps[0]["lenses"]["jlens"][0].keys() == steps[0]["logit_lens"][0].keys()
    assert steps[0]["lenses"]["tuned-1.0"][-1]["topk"] == steps[0]["logit_lens"][-1]["topk"]
    assert [entry["rank"] for entry in steps[0]["router"][0]["topk"]] == [1, 2]
    assert "router" not in steps[1]


def test_the_tables_of_an_older_export_have_the_logit_lens_alone(
    exports: dict[Format, Path], written: list[Step], tmp_path: Path
) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    for file in exports[Format.PARQUET].iterdir():
        table = pq.read_table(file)
        if "lens" in table.column_names:
            own = [name == "logit" for name in table.column("lens").to_pylist()]
            table = table.filter(own).drop_columns(["lens"])
        if file.stem == "step":
            # Its digest covers the experts.
            table = table.drop_columns(["digest"])
        if file.stem != "router_entry":
            pq.write_table(table, folder / file.name)
    import_inline(folder, tmp_path / "target.db")
    with TraceReader(tmp_path / "target.db") as reader:
        assert reader.lens_names(2) == ("logit",)
        for step in written:
            found = replace(reader.step(2, step.step_index), digest=None)
            assert_same(found, replace(step, lenses=(), router=()))


def trace(document: Any) -> Any:
    return document["messages"][1]["trace"]


Edit = Callable[[Any], object]


def jlens(step: Any) -> Any:
    return step["lenses"]["jlens"]


# Of the first step.
EDITS: dict[str, tuple[Edit, str]] = {
    "the name of the Logit Lens": (
        lambda s: s["lenses"].update(logit=jlens(s)),
        "logit is not the name of an installed lens",
    ),
    "a path": (lambda s: s["lenses"].update({"../x": jlens(s)}), "is not the name of an installed"),
    "a long name": (lambda s: s["lenses"].update({"a" * 64: jlens(s)}), "is not the name of an"),
    "a script": (lambda s: s["lenses"].update({"<b>\n": jlens(s)}), "is not the name of an"),
    "no lenses": (lambda s: s.update(lenses=[]), "lenses is not an object"),
    "no rows": (lambda s: s["lenses"].update(jlens={}), "jlens is not a list"),
    "many lenses": (
        lambda s: s.update(lenses={f"l{n}": jlens(s) for n in range(validation.MAX_LENSES + 1)}),
        "lenses has more than 16 entries",
    ),
    "a layer twice": (lambda s: jlens(s).append(jlens(s)[0]), "lens jlens of layer 1: it occurs"),
    "a layer too many": (lambda s: jlens(s)[1].update(layer=4), "lens jlens of layer 4: the model"),
    "a layer below 0": (lambda s: jlens(s)[0].update(layer=-1), "layer is below 0"),
    "no last layer": (lambda s: jlens(s).pop(), "lens jlens: it lacks the last layer, 3"),
    "ranks out of order": (lambda s: jlens(s)[0]["topk"].reverse(), "the ranks of its entries"),
    "a probability above 1": (lambda s: jlens(s)[0].update(chosen_prob=2), "chosen_prob is above"),
    "a negative distance": (lambda s: jlens(s)[0].update(kl=-1), "kl is below"),
    "a text": (lambda s: jlens(s)[0].update(entropy="0"), "entropy is not a number"),
    "many entries, over all lenses": (
        lambda s: s.update(
            lenses={
                f"l{n}": [{"layer": at, "topk": [{"token": "a"}] * 1000} for at in range(4)]
                for n in range(16)
            }
        ),
        "",
    ),
    "an expert twice": (
        lambda s: s["router"][0]["topk"][0].update(expert=s["router"][0]["topk"][1]["expert"]),
        "router of layer 1: it has an expert twice",
    ),
    "weights that rise": (
        lambda s: s["router"][0]["topk"][1].update(weight=0.9),
        "router of layer 1: its entries are not in the order of their weight",
    ),
    "a router twice": (lambda s: s["router"].insert(0, s["router"][0]), "router has a layer twice"),
    "a router of the embedding": (lambda s: s["router"][0].update(layer=0), "the model does not"),
    "a router of no layer": (lambda s: s["router"][2].update(layer=9), "the model does not have"),
    "a negative expert": (
        lambda s: s["router"][0]["topk"][0].update(expert=-1),
        "expert is below 0",
    ),
    "no experts": (lambda s: s["router"][0].update(topk=[]), "it has no expert"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_no_reading_is_refused_in_one_line(
    name: str, exports: dict[Format, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, why = EDITS[name]
    if not why:
        monkeypatch.setattr(validation, "MAX_CELLS", 50_000)
        why = "lens l.* has more than 50,000 entries"
    document = json.loads(exports[Format.JSON].read_text())
    change(trace(document)["steps"][0])
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(document))
    refused(file, tmp_path / "target.db", why)


def refused(file: Path, db: Path, why: str) -> None:
    with pytest.raises(OkiTraceError) as caught:
        import_inline(file, db)
    sentence = str(caught.value)
    assert re.search(why, sentence), sentence
    assert "\n" not in sentence and len(sentence) < 400
    assert not db.exists()


def test_a_policy_that_names_no_lens_is_refused(
    exports: dict[Format, Path], tmp_path: Path
) -> None:
    for lenses, why in (
        (["../x"], "a lens is named by"),
        (["a", "a"], "must not name one twice"),
        ("a", "lenses is not a list"),
    ):
        document = json.loads(exports[Format.JSON].read_text())
        trace(document)["capture"]["policy"]["lenses"] = lenses
        file = tmp_path / "edited.json"
        file.write_text(json.dumps(document))
        refused(file, tmp_path / "target.db", why)


TABLE_EDITS: dict[str, tuple[str, Callable[[list[Any]], object], str]] = {
    "a lens that is none": (
        "lens_layer",
        lambda rows: [row.update(lens="A b") for row in rows if row["lens"] == "jlens"],
        "lens_layer does not have",
    ),
    "entries of no lens": (
        "lens_entry",
        lambda rows: [row.update(lens="other") for row in rows if row["lens"] == "jlens"],
        "lens_entry has a layer that lens_layer does not have",
    ),
    "experts of no step": (
        "router_entry",
        lambda rows: rows.append({**rows[0], "step_id": 99}),
        "have no owner",
    ),
    "experts out of order": (
        "router_entry",
        lambda rows: rows.reverse(),
        "router has a layer twice, or out of order",
    ),
}


@pytest.mark.parametrize("name", TABLE_EDITS)
def test_tables_of_no_reading_are_refused(
    name: str, exports: dict[Format, Path], tmp_path: Path
) -> None:
    table, change, why = TABLE_EDITS[name]
    folder = tmp_path / "tables"
    folder.mkdir()
    for file in exports[Format.PARQUET].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rows = pq.read_table(folder / f"{table}.parquet")
    values = rows.to_pylist()
    change(values)
    pq.write_table(type(rows).from_pylist(values, rows.schema), folder / f"{table}.parquet")
    refused(folder, tmp_path / "target.db", why)


def test_version_1_and_the_report_have_the_logit_lens_alone(
    exports: dict[Format, Path], tmp_path: Path
) -> None:
    import_inline(exports[Format.JSON], tmp_path / "store.db")
    for format in (Format.TRACE_V1, Format.HTML):
        out = io.StringIO()
        with TraceReader(tmp_path / "store.db") as reader:
            export(reader, 1, format, None, out)
        assert out.getvalue() and "jlens" not in out.getvalue()
