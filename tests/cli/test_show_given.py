"""``show`` with given tokens: a scored text, and one token of a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oki_trace.store.reading.reader import TraceReader
from tests.cli.commands import Oki
from tests.exchange import stories


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "s.db"
    stories.fill_given(path, tensors="none")
    return path


def test_a_scored_text_lists_its_first_tokens(db: Path, oki: Oki) -> None:
    shown = oki("show", 1, "--message", 3, "--db", db)
    assert shown.status == 0
    numbers = [line.split()[0] for line in shown.lines if line.split()[:1]]
    assert [number for number in numbers if number.isdigit()][:40] == [*map(str, range(1, 41))]
    assert "position" in shown.out and " 41 " not in shown.out
    assert "complete (scored) · 69 given tokens · " in shown.out
    assert "29 more tokens: oki-trace show 1 --message 3 --position P" in shown.out


def test_a_reply_lists_its_own_steps_alone(db: Path, oki: Oki) -> None:
    shown = oki("show", 1, "--message", 2, "--db", db)
    assert "step" in shown.out and "position" not in shown.out and "more tokens" not in shown.out


def test_one_token_of_the_prompt(db: Path, oki: Oki) -> None:
    shown = oki("show", 1, "--message", 2, "--position", 4, "--db", db)
    assert shown.status == 0
    assert shown.lines[0].startswith("given token at position 4 ")
    for part in ("candidate", "evidence", "layer"):
        assert part in shown.out
    assert "Greedy" not in shown.out and "does not record" not in shown.out
    whole = json.loads(oki("show", 1, "--message", 2, "--json", "--db", db).out)
    (message,) = whole["messages"]
    one = json.loads(oki("show", 1, "--message", 2, "--position", 4, "--json", "--db", db).out)
    assert one == message["trace"]["prompt_steps"][1]
    assert one["origin"] == "given" and one["step"] is None


def test_a_position_in_the_reply_is_its_step(db: Path, oki: Oki) -> None:
    by_step = oki("show", 1, "--message", 2, "--step", 1, "--db", db)
    by_position = oki("show", 1, "--message", 2, "--position", 7, "--db", db)
    assert by_step.out == by_position.out and by_step.status == 0


@pytest.mark.parametrize("position", [0, 2, 9, 1000])
def test_a_position_without_a_step(position: int, db: Path, oki: Oki) -> None:
    shown = oki("show", 1, "--message", 2, "--position", position, "--db", db)
    assert shown.status == 1 and len(shown.err.splitlines()) == 1


def test_a_step_and_a_position(db: Path, oki: Oki) -> None:
    shown = oki("show", 1, "--step", 1, "--position", 2, "--db", db)
    assert shown.status == 2 and "not both" in shown.err


def test_a_position_that_an_earlier_turn_traced(tmp_path: Path, oki: Oki) -> None:
    """It opens that turn's step: of its prompt, or of its reply."""
    stories.fill_two_turns(tmp_path / "s.db")
    with TraceReader(tmp_path / "s.db") as reader:
        assert sorted(reader.prompt_steps(4)) == [*range(1, 10)]
    for position, option in ((4, ("--position", 4)), (7, ("--step", 1))):
        second = oki("show", 1, "--message", 4, "--position", position, "--db", tmp_path / "s.db")
        first = oki("show", 1, "--message", 2, *option, "--db", tmp_path / "s.db")
        assert (second.status, second.out) == (0, first.out)
