"""``export`` and ``import`` as a user types them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from oki_trace.exchange.formats import Format
from tests.cli.commands import Done, Oki, command, start
from tests.exchange import stories


@pytest.fixture
def db(tmp_path: Path) -> Path:
    stories.fill(tmp_path / "s.db", tensors="none")
    return tmp_path / "s.db"


def test_a_conversation_moves_from_one_store_to_another(oki: Oki, db: Path, tmp_path: Path) -> None:
    for name, format in (("a.json", "json"), ("a.jsonl", "jsonl"), ("a", "parquet")):
        target = tmp_path / name
        done = oki("export", "-c", 1, "-f", format, "-o", target, "--db", db)
        assert (done.status, done.out) == (0, "")
        assert done.err.splitlines()[-1] == f"oki-trace: wrote {target}"
        taken = oki("import", target, "--db", tmp_path / "t.db")
        assert taken.status == 0
        assert "8 messages, 5 steps" in taken.out and "oki-trace show" in taken.out
    listed = json.loads(oki("list", "--json", "--db", tmp_path / "t.db").out)
    assert sorted(c["id"] for c in listed) == [1, 2, 3]


def test_standard_output_and_input_are_a_dash(db: Path, tmp_path: Path) -> None:
    for dash in ([], ["-o", "-"]):
        done = start("export", "-c", 1, *dash, "--db", db)
        assert (done.status, done.err) == (0, "")
        assert json.loads(done.out)["version"] == 2
    taken = start("import", "-", "--json", "--db", tmp_path / "t.db", said=done.out)
    assert (taken.status, taken.err) == (0, "")
    assert json.loads(taken.out) == {
        "conversations": [1],
        "messages": 8,
        "steps": 5,
        "changed": 0,
        "without_digest": 0,
    }


def test_a_pipe_takes_a_folder_as_a_zip(oki: Oki, db: Path, tmp_path: Path) -> None:
    import shutil

    oki("export", "-c", 1, "-f", "parquet", "-o", tmp_path / "t", "--db", db)
    packed = shutil.make_archive(str(tmp_path / "t"), "zip", tmp_path / "t")
    with Path(packed).open("rb") as file:
        done = subprocess.run(
            command("import", "-", "--db", tmp_path / "u.db"),
            stdin=file,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("format", list(Format))
def test_an_error_is_one_line_and_leaves_nothing(
    format: Format, oki: Oki, db: Path, tmp_path: Path
) -> None:
    done = oki("export", "-c", 9, "-f", format, "-o", tmp_path / "x", "--db", db)
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1 and "no conversation 9" in done.err
    assert not (tmp_path / "x").exists()


def test_wrong_usage_exits_2(oki: Oki, db: Path) -> None:
    for arguments in (["-f", "parquet"], ["--tensors"], ["-f", "docx"]):
        assert oki("export", "-c", 1, *arguments, "--db", db).status == 2
    assert oki("import", "--db", db).status == 2


def test_what_cannot_be_imported_is_one_line(oki: Oki, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("\x1b[31m nothing")
    done: Done = oki("import", tmp_path / "x.json", "--db", tmp_path / "t.db")
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1 and "\x1b[31m nothing" not in done.err
    assert not (tmp_path / "t.db").exists()


def test_a_full_disk_leaves_what_was_there(oki: Oki, db: Path, tmp_path: Path) -> None:
    target = tmp_path / "gone" / "x.json"
    done = oki("export", "-c", 1, "-o", target, "--db", db)
    assert done.status == 1 and "Cannot write" in done.err and "--output" in done.err


def test_the_store_is_neither_replaced_nor_read_as_an_export(oki: Oki, db: Path) -> None:
    before = db.read_bytes()
    for arguments in (
        ("export", "-c", 1, "-o", db),
        ("export", "-c", 1, "-f", "parquet", "-o", db),
        ("sql", "SELECT 1", "--format", "csv", "-o", db),
        ("import", db),
    ):
        done = oki(*arguments, "--db", db)
        assert done.status == 2, arguments
        assert "is the store itself. Give another path" in done.err
    assert db.read_bytes() == before
