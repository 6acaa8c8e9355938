"""Each format as others read it: data frames, safetensors, line by line, in little memory."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import duckdb
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from oki_trace.errors import ExchangeError, NotFound, UsageError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.json_export import V1_CANDIDATE, V1_EVIDENCE, V1_STEP, V1_TRACE
from oki_trace.exchange.reading import json_stream, table_cursor, validation
from oki_trace.exchange.tables import FILES, TABLES
from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Status, TurnEnd
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.exchange import stories

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formats") / "s.db"
    stories.fill(path)
    return path


def write(db: Path, format: Format, target: Path | None, out: TextIO | None = None, **how: Any):
    with TraceReader(db) as reader:
        return export(reader, 1, format, target, out or sys.stdout, **how)


# --------------------------------------------------------------------------- tables


def test_tables_open_in_pandas_and_duckdb_and_say_what_the_store_says(
    db: Path, tmp_path: Path
) -> None:
    write(db, Format.PARQUET, tmp_path / "t")
    assert {p.name for p in (tmp_path / "t").iterdir()} == FILES
    steps = pd.read_parquet(tmp_path / "t" / "step.parquet")
    with TraceReader(db) as reader:
        assert steps["token"].tolist() == [s.token for s in reader.steps(3)] + ["é"]
        ids = {s.step_index: s.id for s in reader.steps(3)}
        rows = duckdb.sql(
            f"SELECT step_index, t.* FROM '{tmp_path}/t/tensor.parquet' t "
            f"JOIN '{tmp_path}/t/step.parquet' s ON s.id = t.step_id WHERE message_id = 3"
        ).fetchall()
        assert len(rows) == 3 * 3 + 1
        for index, step_id, name, dtype, shape, layers, _, data in rows:
            assert step_id == ids[index]
            kept = reader.tensor(3, index, name)
            as_read = np.frombuffer(data, "uint16" if dtype == "bfloat16" else dtype)
            assert np.array_equal(as_read.reshape(shape), kept.array)
            assert tuple(layers) == kept.layers
    counted = duckdb.sql(
        f"SELECT lens, count(*) FROM '{tmp_path}/t/lens_entry.parquet' GROUP BY lens ORDER BY lens"
    ).fetchall()
    assert counted == [("jlens", 2 * 5), ("logit", 4 * 4 * 5), ("tuned-1.0", 4 * 5)]


def test_the_tables_have_the_columns_of_the_store() -> None:
    """The names of the contract and of ``oki-trace sql``; what is of the store alone is not."""
    own = {
        "conversation": {"updated_at", "uid"},
        "message": {"owner", "heartbeat_at", "stop_requested", "score_of", "readings"},
        "step": {"tensor_bytes"},
        "tensor": {"id", "codec", "checksum", "raw_bytes"},
    }
    more = {"message": {"tokens"}}
    for name, table in TABLES.items():
        columns = set(models.Base.metadata.tables[name].columns.keys())
        assert set(table.names) == (columns - own.get(name, set())) | more.get(name, set())


def test_tables_take_the_place_of_an_older_export_and_of_nothing_else(
    db: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        write(db, Format.PARQUET, tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    (tmp_path / "t" / "mine.txt").write_text("kept")
    with pytest.raises(ExchangeError, match=r"not part of an export, such as mine\.txt"):
        write(db, Format.PARQUET, tmp_path / "t")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ExchangeError, match="is not a folder"):
        write(db, Format.PARQUET, tmp_path / "file")
    with pytest.raises(NotFound), TraceReader(db) as reader:
        export(reader, 99, Format.PARQUET, tmp_path / "new", sys.stdout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "t"]
    assert (tmp_path / "t" / "mine.txt").read_text() == "kept"


# -------------------------------------------------------------------------- tensors


def test_tensors_open_with_the_library_of_the_format(db: Path, tmp_path: Path) -> None:
    written = write(db, Format.JSON, tmp_path / "a.json", tensors=True)
    assert written == [tmp_path / "a.json", tmp_path / "a.safetensors"]
    with (
        safe_open(tmp_path / "a.safetensors", framework="pt") as file,
        TraceReader(db) as reader,
    ):
        names = set(file.keys())
        assert {"message-3/step-0/logits", "message-8/step-0/attentions"} <= names
        assert len(names) == 3 * 3 + 1 + 3
        for name in names:
            message, step, tensor = name.split("/")
            kept = reader.tensor(
                int(message.removeprefix("message-")), int(step.removeprefix("step-")), tensor
            )
            loaded = file.get_tensor(name)
            if kept.dtype == "bfloat16":
                import torch

                loaded = loaded.view(torch.uint16)
            assert np.array_equal(loaded.numpy(), kept.array)


# ---------------------------------------------------------------------- JSON and v1


def test_lines_are_a_head_and_a_step_each(db: Path) -> None:
    out = io.StringIO()
    write(db, Format.JSONL, None, out)
    head, *steps = map(json.loads, out.getvalue().splitlines())
    assert (head["format"], head["version"], head["layout"]) == ("oki-trace", 2, "jsonl")
    assert [(step["message"], step["step"]) for step in steps] == [
        *((3, 0), (3, 1), (3, 2), (3, 3), (8, 0)),
    ]
    assert "steps" not in head["messages"][2]["trace"]


def test_version_1_has_its_names_and_no_other(db: Path) -> None:
    out = io.StringIO()
    write(db, Format.TRACE_V1, None, out, message_id=3)
    trace = json.loads(out.getvalue())
    assert set(trace) == {*V1_TRACE, "steps"}
    for step in trace["steps"]:
        assert set(step) == {*V1_STEP, "logits_topk", "evidence", "logit_lens"}
        assert all(set(entry) == set(V1_CANDIDATE) for entry in step["logits_topk"])
        assert all(set(entry) == set(V1_EVIDENCE) for entry in step["evidence"])
        assert all(set(row) == {"layer", "topk"} for row in step["logit_lens"])
    out = io.StringIO()
    write(db, Format.TRACE_V1, None, out)
    assert len(json.loads(out.getvalue())) == 2, "of several replies a list"


def test_what_a_format_does_not_hold_is_said_in_a_line(db: Path, tmp_path: Path) -> None:
    def sentences(format: Format, **how: Any) -> list[str]:
        told: list[str] = []
        write(db, format, tmp_path / f"x.{format}", tell=told.append, **how)
        assert all("\n" not in sentence for sentence in told)
        return told

    assert "full tensors are left out" in sentences(Format.JSON)[0]
    assert sentences(Format.JSONL, tensors=True) == sentences(Format.PARQUET) == []
    assert "not needed" in sentences(Format.PARQUET, tensors=True)[0]
    assert "no full tensors" in sentences(Format.HTML)[0]
    v1 = sentences(Format.TRACE_V1)
    assert "only the ids of chosen tokens" in v1[0] and "--message selects one" in v1[1]


@pytest.mark.parametrize(
    ("format", "output", "tensors", "why"),
    [
        (Format.PARQUET, None, False, "choose it with --output"),
        (Format.JSON, None, True, "choose it with --output"),
        (Format.HTML, "x.html", True, "cannot contain full tensors"),
        (Format.TRACE_V1, "x.json", True, "cannot contain full tensors"),
        (Format.JSON, "x.safetensors", True, "choose another --output"),
    ],
)
def test_what_cannot_be_combined_is_wrong_usage(
    format: Format, output: str | None, tensors: bool, why: str, db: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        write(db, format, tmp_path / output if output else None, tensors=tensors)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 steps with 200 kB of tensors each: 80 MB, if all were held."""
    path = tmp_path_factory.mktemp("long") / "s.db"
    rng = np.random.default_rng(0)
    tensors = builders.tensors(rng, vocab=50_000)
    with TraceWriter(path) as writer:
        conversation = writer.create_conversation("long")
        reply = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(tensors="exact"), claim=True
        )
        writer.start_reply(reply, builders.turn_start("exact"))
        step = builders.step(0, rng, with_lens=True, with_tensors=False)
        for start in range(0, 400, 100):
            writer.append(
                reply,
                [
                    replace(step, step_index=i, position=6 + i, lens=None, tensors=tensors)
                    for i in range(start, start + 100)
                ],
            )
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "token limit", 1.0))
    return path


@pytest.mark.parametrize("format", [Format.JSON, Format.JSONL, Format.PARQUET, Format.TRACE_V1])
def test_memory_does_not_grow_with_the_reply(format: Format, long: Path, tmp_path: Path) -> None:
    tensors = format in (Format.JSON, Format.JSONL)
    write(long, format, tmp_path / "warm", tensors=tensors)
    tracemalloc.start()
    try:
        write(long, format, tmp_path / "x", tensors=tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    written = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) / 2
    assert peak < 15_000_000, f"{peak:,} bytes at once for {written:,.0f} written"


def test_progress_counts_every_step(db: Path) -> None:
    for format in (Format.JSON, Format.JSONL, Format.TRACE_V1, Format.HTML):
        calls: list[tuple[int, int]] = []
        write(db, format, None, io.StringIO(), progress=lambda d, t: calls.append((d, t)))  # noqa: B023
        assert calls == [(n, 5) for n in range(1, 6)]


# ----------------------------------------------------------------------------- docs


def test_the_page_on_formats_names_every_field_and_limit(db: Path) -> None:
    """docs/formats.md has every field and every limit."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    out = io.StringIO()
    write(db, Format.JSON, None, out)
    document = json.loads(out.getvalue())

    def names(value: Any) -> set[str]:
        if isinstance(value, dict):
            # Whatever a tool or a template takes is no field of ours.
            values = [v for k, v in value.items() if k not in ("arguments", "tools")]
            if isinstance(value.get("lenses"), dict):
                values += value["lenses"].values()  # their keys are names of lenses
                values.remove(value["lenses"])
            return set(value).union(*map(names, values))
        return set().union(*map(names, value)) if isinstance(value, list) else set()

    columns = {name for schema in TABLES.values() for name in schema.names}
    missing = [n for n in sorted(names(document) | columns | set(TABLES)) if f"`{n}`" not in page]
    assert missing == []
    for limit in (
        *(validation.MAX_PROMPT, validation.MAX_STEPS, validation.MAX_MESSAGES),
        *(validation.MAX_ENTRIES, validation.MAX_LAYERS, validation.MAX_CELLS),
        *(validation.MAX_TEXT, validation.MAX_TOKEN, validation.MAX_LENSES),
        *(table_cursor.MAX_ROWS, json_stream.MAX_VALUE_CHARACTERS),
    ):
        assert f"{limit:,}" in page
