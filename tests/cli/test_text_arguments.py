"""Text on the command line is stored unchanged, or refused in one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, Oki, command, start

HALF = b"caf\xe9"


def told(*arguments: object, said: bytes = b"") -> tuple[int, bytes, bytes]:
    """Status and outputs of a command whose arguments may be any bytes."""
    given = [one if isinstance(one, bytes) else str(one).encode() for one in arguments]
    done = subprocess.run(
        [*(part.encode() for part in command()), *given],
        input=said,
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", HALF),
        ("run", "Hello", "--system", HALF),
        ("run", "Hello", "--model", HALF),
        ("run", "Hello", "--db", HALF + b".db"),
        ("rename", "1", HALF),
        ("list", "--search", HALF),
        ("sql", b"SELECT '" + HALF + b"'"),
        ("ask", "settle", "--text", HALF),
        ("import", HALF + b".json"),
        ("export", "1", "--output", HALF),
    ],
    ids=str,
)
def test_an_argument_that_is_not_utf8_is_refused(
    tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    status, out, err = told(*arguments)
    assert (status, out) == (2, b"")
    assert len(err.splitlines()) == 1 and rb"not UTF-8 (" in err and rb"caf\xe9" in err


@pytest.mark.parametrize("said", [HALF, b"a\0b"])
@pytest.mark.parametrize("arguments", [("run", "-"), ("chat",)])
def test_a_prompt_from_a_pipe_is_kept_or_refused(
    tmp_path: Path, small: Path, said: bytes, arguments: tuple[str, ...]
) -> None:
    db = tmp_path / "store.db"
    status, _, err = told(*arguments, "--model", small, "--db", db, said=said + b"\n")
    assert status == 2 and len(err.splitlines()) == 1 and b"The prompt holds" in err
    assert json.loads(start("list", "--json", "--db", db).out or "[]") == []


def test_spaces_are_kept_by_run_and_chat_alike(tmp_path: Path, small: Path) -> None:
    db, text = tmp_path / "store.db", "  the fox  "
    common = ("--model", small, "--db", db, "--max-new-tokens", 2)
    assert start("run", text, *common).status == 0
    assert start("run", "-", *common, said=text + "\r\n").status == 0
    assert start("chat", *common, said=text + "\r\n \nnot asked\n").status == 0
    asked = "SELECT content FROM message WHERE role = 'user'"
    rows = json.loads(start("sql", asked, "--json", "--db", db).out)
    assert [row["content"] for row in rows] == [text] * 3


@pytest.mark.parametrize("text", ["-5 + 3", "-5", "-m is a slope", "-c 2 is it"])
def test_a_prompt_that_looks_like_an_option_is_told_of_the_dashes(oki: Oki, text: str) -> None:
    done = oki("run", text)
    said = " ".join(done.err.replace("│", " ").split())
    assert done.status == 2 and "Put a text that begins with - after --: oki-trace run --" in said
    assert ". ." not in said


def test_a_misspelt_option_is_no_text(oki: Oki) -> None:
    assert "begins with - after --" not in oki("run", "Hello", "--temprature", "1").err


@pytest.mark.parametrize(
    "options",
    [
        ("run", "Hello", "--repetition-penalty", "inf"),
        ("run", "Hello", "--repetition-penalty", "nan"),
        ("run", "Hello", "--temperature", "nan"),
        ("run", "Hello", "--temperature", "inf"),
        ("run", "Hello", "--top-p", "nan"),
        ("sql", "SELECT 1", "--timeout", "inf"),
        ("sql", "SELECT 1", "--timeout", "nan"),
        ("sql", "SELECT 1", "--memory", "9" * 400),
        ("ask", "uncertainty", "--least", "nan"),
        ("prune", "--max-size", "9" * 400),
    ],
    ids=str,
)
def test_a_number_is_finite(oki: Oki, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = oki(*options, "--db", tmp_path / "store.db")
    assert (done.status, done.out) == (2, "") and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "store.db").exists()
