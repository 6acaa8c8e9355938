"""Whatever a file holds, it is imported whole, or refused in one line and not at all."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oki_trace.errors import OkiTraceError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.reading import json_stream, source, validation
from oki_trace.exchange.tables import TABLES
from oki_trace.store.reading.reader import TraceReader
from tests.exchange import stories
from tests.exchange.inline import import_inline as import_path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    folder = tmp_path_factory.mktemp("exports")
    stories.fill(folder / "s.db", steps=2)
    written = {}
    with TraceReader(folder / "s.db") as reader:
        for format in (Format.JSON, Format.JSONL, Format.PARQUET, Format.TRACE_V1):
            written[format] = folder / f"{format}.file"
            export(reader, 1, format, written[format], sys.stdout)
        export(reader, 1, Format.JSON, folder / "full.json", sys.stdout, tensors=True)
    return written


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "t.db"


def refused(path: Path, db: Path, why: str = "") -> None:
    """The file is refused in one line, and no store is created."""
    with pytest.raises(OkiTraceError) as caught:
        import_path(path, db)
    sentence = str(caught.value)
    assert re.search(why, sentence), sentence
    assert "\n" not in sentence and len(sentence) < 400
    assert not db.exists()


def whole_or_nothing(path: Path, db: Path) -> None:
    """The file is imported whole or not at all, and every error is one of ours."""
    db.unlink(missing_ok=True)
    try:
        imported = import_path(path, db)
    except OkiTraceError as error:
        assert "\n" not in str(error)
        assert not db.exists()
        return
    with TraceReader(db) as reader:
        assert sum(len(reader.messages(n)) for n in imported.conversations) == imported.messages
        for number in imported.conversations:
            for message in reader.messages(number):
                assert not message.status.is_live
                if message.capture:
                    assert len(list(reader.iter_steps(message.id))) == message.tokens
            export(reader, number, Format.JSON, path.parent / "again.json", io.StringIO())


# -------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "not an oki-trace export"),
        (b"hello", "not an oki-trace export"),
        (b"{}", "neither a prompt nor an output"),
        (b"[]", "contains no conversation"),
        (b"[1]", "is not an object"),
        (b'{"prompt": "a", "output": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "x": Infinity}', "Infinity is not JSON"),
        (b'{"prompt": "a", "x": 1e999}', "too large a number"),
        (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "import"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a"} and more', "continues after the end of its JSON"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        (b'{"prompt": "a', "in the middle"),
        (b'{"x": ' + b"[" * 200_000, "nested too deeply|in the middle"),
        (b"[" * 200_000, "nested too deeply|in the middle|not an object"),
        (b'{"prompt": "a", "steps": {"chosen_token": "a"}}', "steps is not a list"),
        (b'{"prompt": "a", "prompt_len": 5000000}', "prompt_len"),
        (b'{"prompt": "a", "prompt_len": -1}', "prompt_len"),
        (b'{"prompt": "a", "prompt_len": true}', "prompt_len"),
        (b'{"prompt": "a", "version": 3}', "upgrade oki-trace"),
        (b'{"prompt": "a", "format": "other"}', "the format of the .*is not oki-trace"),
        (b'{"prompt": "a", "status": "dancing"}', "dancing"),
        (b'{"prompt": "a", "messages": [{"role": "robot", "content": ""}]}', "robot"),
        (b"\x1f\x8b\x08\x00", "compressed"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed"),
        (b"PAR1", "import its folder"),
        (b"PK\x03\x04 no zip at all", "zip is damaged"),
        (b"SQLite format 3\x00", "not an oki-trace export"),
    ],
)
def test_what_is_no_export_is_refused_in_one_line(
    text: bytes, why: str, tmp_path: Path, db: Path
) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text)
    refused(file, db, why)


def edited(exports: dict[Format, Path], change: Callable[[Any], object], into: Path) -> Path:
    document = json.loads(exports[Format.JSON].read_text())
    change(document)
    into.write_text(json.dumps(document))
    return into


def trace(document: Any) -> Any:
    return document["messages"][2]["trace"]


EDITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "duplicate ids": (lambda d: d["messages"][1].update(id=1), "two messages have the id 1"),
    "a step gone": (lambda d: trace(d)["steps"].pop(0), "out of order"),
    "the last step gone": (lambda d: trace(d)["steps"].pop(), "2 of its 3 steps"),
    "a step twice": (lambda d: trace(d)["steps"].insert(0, trace(d)["steps"][0]), "out of order"),
    "another position": (lambda d: trace(d)["steps"][0].update(position=9), "position is not 6"),
    "evidence ahead": (
        lambda d: trace(d)["steps"][0]["attention"][0]["topk"][0].update(position=6),
        "reaches position 6",
    ),
    "a huge layer": (
        lambda d: trace(d)["steps"][0]["logit_lens"][0].update(layer=10**9),
        "layer is above 1,000",
    ),
    "a layer twice": (
        lambda d: trace(d)["steps"][0]["logit_lens"][0].update(layer=1),
        "layer 1: it occurs twice",
    ),
    "too many candidates": (
        lambda d: trace(d)["steps"][0].update(logits_topk=[{"token": "a"}] * 1001),
        "more than 1,000",
    ),
    "a wide lens over many layers": (
        lambda d: (
            trace(d)["capture"].update(layers=1000),
            trace(d)["steps"][0].update(
                logit_lens=[{"layer": 1000, "topk": [{"token": "a"}] * 1000}]
            ),
        ),
        "more than 200,000",
    ),
    "a number beyond 32 bits": (
        lambda d: trace(d)["steps"][0].update(entropy=1e300),
        "too large a number",
    ),
    "an id beyond 32 bits": (lambda d: trace(d)["steps"][0].update(chosen_id=2**40), "chosen_id"),
    "text for a number": (
        lambda d: trace(d)["steps"][0].update(prob="0.5"),
        "is not a number",
    ),
    "no token": (lambda d: trace(d)["steps"][0].pop("chosen_token"), "chosen_token is missing"),
    "no hex": (lambda d: trace(d)["steps"][0].update(chosen_bytes="zz"), "hexadecimal"),
    "ids of another length": (
        lambda d: trace(d)["prompt_token_ids"].pop(),
        "different numbers",
    ),
    "an unknown segment": (
        lambda d: trace(d)["prompt_segments"].__setitem__(0, "x"),
        "'x', which is none of",
    ),
    "settings out of range": (
        lambda d: d["messages"][2]["sampling"].update(temperature=-1),
        "(?i)temperature",
    ),
    "a time that is none": (lambda d: d["conversation"].update(created_at="x"), "is not a time"),
    "a time before time": (
        lambda d: d["conversation"].update(created_at="0001-01-01T00:00:00+14:00"),
        "not within the years",
    ),
    "messages that are none": (
        lambda d: d.update(messages=[1]),
        "not an object|not an oki-trace export",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_does_not_fit_is_refused(
    name: str, exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    change, why = EDITS[name]
    refused(edited(exports, change, tmp_path / "x.json"), db, why)


def test_too_many_messages_are_refused(
    exports: dict[Format, Path], tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert validation.MAX_MESSAGES == 10_000
    monkeypatch.setattr(validation, "MAX_MESSAGES", 100)

    def add(document: Any) -> None:
        document.update(messages=[{"role": "user", "content": ""}] * 101)

    refused(edited(exports, add, tmp_path / "x.json"), db, "more than 100 messages")


def test_a_store_that_is_there_is_left_as_it_was(
    exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    import_path(exports[Format.JSON], db)
    with TraceReader(db) as reader:
        before = reader.version()
        with pytest.raises(OkiTraceError):
            import_path(edited(exports, EDITS["the last step gone"][0], tmp_path / "x.json"), db)
        assert reader.version() == before


def test_a_value_without_end_is_given_up_on(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "MAX_VALUE_CHARACTERS", 1_000_000)
    file = tmp_path / "x.json"
    file.write_text('{"prompt": "' + "a" * 3_000_000)
    refused(file, db, "longer than 1,000,000 characters")


def test_steps_without_end_are_given_up_on(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "MAX_STEPS", 10)
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"prompt": "", "output": "", "steps": [{"chosen_token": "a"}] * 11}))
    refused(file, db, "more than 10")


def test_traces_of_version_1_have_so_many_steps_in_total(
    exports: dict[Format, Path], tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a million would take minutes; a document may have as many in each reply."""
    monkeypatch.setattr(validation, "MAX_STEPS", 3)
    trace = {"prompt": "", "output": "", "steps": [{"chosen_token": "a"}] * 2}
    file = tmp_path / "x.json"
    for text in (json.dumps([trace, trace]), json.dumps([trace, trace]).replace("_", "\\u005f")):
        file.write_text(text)
        refused(file, db, "more than 3 steps in total")
    file.write_text(json.dumps(trace))
    assert import_path(file, tmp_path / "trace.db").steps == 2
    assert import_path(exports[Format.JSON], tmp_path / "document.db").steps == 4


@pytest.mark.parametrize("format", [Format.JSON, Format.JSONL, Format.TRACE_V1])
def test_a_file_cut_short_anywhere_is_refused(
    format: Format, exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    data = exports[format].read_bytes().rstrip()
    file = tmp_path / "x.json"
    lines = [match.start() for match in re.finditer(b"\n", data)]
    for end in (1, 100, len(data) // 2, *lines, len(data) - 1):
        file.write_bytes(data[:end])
        refused(file, db)


# ------------------------------------------------------------------ files and zips


def test_what_is_no_file_is_refused(tmp_path: Path, db: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere.json", db, "No such file")
    refused(tmp_path / "pipe", db, "is not a file")
    refused(tmp_path / "empty", db, "conversation.parquet: No such file")
    refused(Path("/dev/zero"), db, "is not a file")


def test_a_link_in_the_folder_or_beside_the_file_is_not_followed(
    exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for table in exports[Format.PARQUET].iterdir():
        (folder / table.name).symlink_to(table)
    refused(folder, db, "is a link")
    file = tmp_path / "x.json"
    file.write_bytes(exports[Format.JSON].read_bytes())
    (tmp_path / "x.safetensors").symlink_to("/etc/passwd")
    refused(file, db, "x.safetensors is a link")


def packed(into: Path, members: dict[str, bytes], mode: int = 0o644) -> Path:
    with zipfile.ZipFile(into, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return into


@pytest.mark.parametrize(
    "name",
    [
        *("../step.parquet", "/tmp/step.parquet", "a/../../step.parquet", "a/b/step.parquet"),
        *("..\\step.parquet", "C:\\step.parquet", "readme.txt", "step.parquet/../x", ".."),
    ],
)
def test_a_zip_cannot_name_a_place(name: str, tmp_path: Path, db: Path) -> None:
    refused(
        packed(tmp_path / "x.zip", {name: b"x"}), db, "path is not that of a table|is not a table"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip"]


def test_a_zip_whose_members_are_damaged_is_refused(tmp_path: Path, db: Path) -> None:
    """Damage to the compressed data, and to the compression method."""
    whole = packed(tmp_path / "x.zip", {"step.parquet": bytes(range(256)) * 50}).read_bytes()
    start = 30 + len("step.parquet")
    (tmp_path / "x.zip").write_bytes(whole[:start] + b"\0\0\0\0" + whole[start + 4 :])
    refused(tmp_path / "x.zip", db, "damaged or encrypted")
    central = whole.rindex(b"PK\x01\x02")
    for way in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, 99):
        data = bytearray(whole)
        for at in (8, central + 10):
            struct.pack_into("<H", data, at, way)
        (tmp_path / "x.zip").write_bytes(data)
        refused(tmp_path / "x.zip", db, "a compression other than deflate")


def test_zips_of_links_doubles_and_bombs_are_refused(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = packed(tmp_path / "link.zip", {"step.parquet": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    refused(link, db, "path is not that of a table")
    refused(packed(tmp_path / "two.zip", {"a/step.parquet": b"", "step.parquet": b""}), db, "step")
    many = {f"{n}.parquet": b"" for n in range(50)}
    refused(packed(tmp_path / "many.zip", many), db, "more files")
    monkeypatch.setattr(source, "MAX_UNPACKED_FLOOR", 1_000_000)
    bomb = packed(tmp_path / "bomb.zip", {"step.parquet": bytes(50_000_000)})
    assert bomb.stat().st_size < 60_000
    refused(bomb, db, "far more than an export")
    # The size that it states is not trusted.
    data = bytearray(bomb.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, central + 24, 10)
    (tmp_path / "liar.zip").write_bytes(data)
    refused(tmp_path / "liar.zip", db)


# -------------------------------------------------------------------------- tables


def with_table(exports: dict[Format, Path], into: Path, name: str, change: Any) -> Path:
    into.mkdir()
    for file in exports[Format.PARQUET].iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    rows = pq.read_table(into / f"{name}.parquet").to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema=TABLES[name])
    pq.write_table(table, into / f"{name}.parquet")
    return into


TABLE_EDITS: dict[str, tuple[str, Callable[[list[Any]], object], str]] = {
    "no conversation": ("conversation", lambda rows: rows.clear(), "no row"),
    "two conversations": ("conversation", lambda rows: rows.append(rows[0]), "several rows"),
    "a message twice": (
        "message",
        lambda rows: rows.append(rows[0]),
        "two messages have the id|position is not 8",
    ),
    "a step gone": ("step", lambda rows: rows.pop(0), "not step 0|have no owner"),
    "a step of nothing": (
        "step",
        lambda rows: rows.append({**rows[-1], "message_id": 99}),
        "have no owner",
    ),
    "entries out of order": ("topk_entry", lambda rows: rows.reverse(), "belong|ranks|order"),
    "ranks twice": ("topk_entry", lambda rows: rows[1].update(rank=1), "ranks"),
    "a null token": ("topk_entry", lambda rows: rows[0].update(token=None), "token is missing"),
    "a tensor too small": (
        "tensor",
        lambda rows: rows[0].update(data=b"1"),
        "does not match its shape",
    ),
    "a huge shape": (
        "tensor",
        lambda rows: rows[0].update(shape=[2**40, 2**40]),
        "does not match its shape",
    ),
    "a negative shape": (
        "tensor",
        lambda rows: rows[0].update(shape=[-1, -1]),
        "is below 0",
    ),
    "an unknown tensor": ("tensor", lambda rows: rows[0].update(name="x"), "name is 'x', which"),
    "a tensor twice": ("tensor", lambda rows: rows.insert(0, rows[0]), "more than 3 rows"),
    "an unknown dtype": (
        "tensor",
        lambda rows: rows[0].update(dtype="object"),
        "'object'",
    ),
    "no JSON": ("message", lambda rows: rows[2].update(capture="{"), "not a JSON object"),
    "NaN in JSON": ("message", lambda rows: rows[2].update(generation="NaN"), "not a JSON object"),
    "deep JSON": ("step", lambda rows: rows[0].update(decision="[" * 100_000), "not a JSON object"),
    "a lens of no layer": (
        "lens_entry",
        lambda rows: rows[0].update(layer=77),
        "a layer that lens_layer does not have|order",
    ),
}


@pytest.mark.parametrize("name", TABLE_EDITS)
def test_tables_that_do_not_fit_are_refused(
    name: str, exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    table, change, why = TABLE_EDITS[name]
    refused(with_table(exports, tmp_path / "x", table, change), db, why)


def test_columns_are_as_names_in_json(
    exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    """Of another type they are refused; one may be missing, and one too many is not read."""
    folder = with_table(exports, tmp_path / "x", "step", lambda rows: None)
    table = pq.read_table(folder / "step.parquet")
    as_text = table.column("prob").cast(pa.string())
    for changed, why in (
        (
            table.set_column(table.column_names.index("prob"), "prob", as_text),
            "the wrong type in column",
        ),
        (table.drop_columns(["message_id"]), "no column message_id"),
        (table.drop_columns(["token"]), "chosen_token is missing"),
    ):
        pq.write_table(changed, folder / "step.parquet")
        refused(folder, db, why)
    more = table.drop_columns(["margin"]).append_column("x", table.column("token"))
    pq.write_table(more, folder / "step.parquet")
    import_path(folder, db)
    db.unlink()
    (folder / "step.parquet").write_bytes(b"PAR1 and nothing PAR1")
    refused(folder, db, "damaged or not a Parquet file")
    (folder / "step.parquet").unlink()
    refused(folder, db, "step.parquet: No such file")
