"""Every command has help and an example, and docs/commands.md matches it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from oki_trace import __version__
from oki_trace.cli.app import app
from oki_trace.store.writing.writer import TraceWriter
from scripts import command_help
from tests.cli.commands import ACTIVE, Oki

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    name: made
    for name, made in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if hasattr(made, "commands")
}
# Those of a group, such as ``lens add``, in place of the group.
COMMANDS = sorted(
    [name for name in typer.main.get_command(app).commands if name not in GROUPS]  # type: ignore[attr-defined]
    + [f"{group} {name}" for group, made in GROUPS.items() for name in made.commands]
)


def unwrapped(text: str) -> str:
    """Help without its boxes and line ends."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_the_page_on_commands_is_what_their_help_says() -> None:
    assert sorted(command_help.commands()) == COMMANDS
    told = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert told == command_help.page(), "run: python scripts/command_help.py"


def test_every_example_is_a_command_that_parses() -> None:
    made = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in command_help.commands().items():
        shown = command_help.examples(command)
        assert shown
        for line in shown:
            words = shlex.split(re.sub(r" < \S+$", "", line))
            called = name.split()
            assert words[: 1 + len(called)] == ["oki-trace", *called], line
            context = made[called[0]]
            for inner in called[1:]:
                context = context.commands[inner]
            context.make_context(name, words[1 + len(called) :])


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("oki-trace ex", "export"), ("oki-trace export --for", "--format")],
)
def test_a_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    """As bash asks after ``oki-trace --install-completion``."""
    environment = {
        **os.environ,
        "_OKI_TRACE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from oki_trace.cli import main; main()"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert offered in done.stdout.split()


def test_the_commands_of_the_contract_are_there() -> None:
    assert {"demo", "run", "chat", "list", "show", "info", "export", "migrate", "ui"} <= {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(oki: Oki, name: str) -> None:
    for option in ("--help", "-h"):
        done = oki(*name.split(), option)
        assert (done.status, done.err) == (0, "")
        assert not ACTIVE.search(done.out)
        text = unwrapped(done.out)
        assert f"Example: oki-trace {name}" in text
        # Each option says what it is for.
        assert "--help" in text and not re.search(r"--[a-z-]+ +(<\w+> +)?(?=--)", text)


WITHOUT_STORE = {"bench", "lens add", "lens list", "lens remove"}


@pytest.mark.parametrize("name", sorted({*COMMANDS} - WITHOUT_STORE))
def test_every_command_takes_a_store(oki: Oki, name: str) -> None:
    text = unwrapped(oki(*name.split(), "--help").out)
    assert "--db PATH_OR_URL The store. [default: ($OKI_TRACE_DB)]" in text


@pytest.mark.parametrize("name", ["run", "chat"])
def test_the_default_model_is_told(oki: Oki, name: str) -> None:
    assert "[default: ($OKI_TRACE_MODEL)]" in unwrapped(oki(name, "--help").out)


def test_exit_statuses_and_debug_are_told(oki: Oki) -> None:
    text = unwrapped(oki("--help").out)
    assert "--debug, which shows tracebacks" in text
    assert "Exit status: 0 success, 1 failure, 2 wrong usage, 130 ended by Ctrl-C" in text
    assert "the exit status is 130" in unwrapped(oki("run", "--help").out)
    for name in COMMANDS:
        assert f" {name.split()[0]} " in text


def test_version(oki: Oki) -> None:
    assert oki("--version").out == f"oki-trace {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["run"], ["list", "too", "many"]])
def test_wrong_usage_exits_2(oki: Oki, arguments: list[str]) -> None:
    assert oki(*arguments).status == 2


def test_help_and_browsing_wait_for_no_library_they_do_not_use(tmp_path: Path) -> None:
    """Importing torch takes seconds and SQLAlchemy half of one: help needs neither."""
    code = (
        "import sys\n"
        "from oki_trace.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended\n"
        "heavy = {'torch', 'transformers', 'streamlit', 'pandas', 'duckdb', 'pyarrow'}\n"
        "heavy |= {'sqlalchemy'} if '--help' in sys.argv else set()\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    db = str(tmp_path / "new.db")
    TraceWriter(db).close()
    for arguments in (["--help"], ["run", "--help"], ["list", "--db", db]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]", arguments
