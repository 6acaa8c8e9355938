"""The columns of a map: the prompt's tokens, then the reply's, in windows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashboard.viewdata import map_columns as viewdata
from dashboard.viewdata.map_columns import MapColumn, Run
from oki_trace.store.reading.prompt_steps import PromptStep
from tests import builders

PROMPT = 6


def given(position: int, owner: int = 2) -> PromptStep:
    step = replace(builders.summary(0, " p"), step_index=-1, position=position, origin="given")
    return PromptStep(owner, step)


def columns(prompt: int, steps: int) -> list[MapColumn]:
    """A reply whose prompt was traced from position 1 on."""
    summaries = [replace(builders.summary(n), position=prompt + n) for n in range(steps)]
    return viewdata.map_columns(2, prompt, {at: given(at) for at in range(1, prompt)}, summaries)


def test_a_second_turn_takes_the_steps_of_the_first() -> None:
    """Its prompt: the first turn's tokens 1 and 2, its reply's steps 0 and 1, then its own."""
    said = [replace(builders.summary(n), position=3 + n) for n in range(2)]
    prompt = {
        1: given(1, owner=1),
        2: given(2, owner=1),
        **{step.position: PromptStep(1, step) for step in said},
        5: given(5),
    }
    reply = [replace(builders.summary(n), position=PROMPT + n) for n in range(3)]
    made = viewdata.map_columns(2, PROMPT, prompt, reply)
    assert [column.number for column in made] == [-5, -4, -3, -2, -1, 0, 1, 2]
    assert viewdata.runs(made) == [
        Run(1, True, 1, 3, -6),
        Run(1, False, 0, 2, -3),
        Run(2, True, 5, 6, -6),
        Run(2, False, 0, 3, 0),
    ]
    data = viewdata.column_data(made)
    assert data["reply"] == 5
    assert [step["where"] for step in data["steps"]][3:6] == ["position 4", "position 5", "step 0"]
    assert [step["label"] for step in data["steps"]][3:6] == [4, 5, 0]


@pytest.mark.parametrize(("prompt", "steps"), [(1, 5), (6, 0), (1, 40), (41, 0), (33, 40), (4, 90)])
def test_windows_cover_every_column_once(prompt: int, steps: int) -> None:
    made = columns(prompt, steps)
    windows = viewdata.windows(made, 16)
    assert [at for first, end in windows for at in range(first, end)] == list(range(len(made)))
    assert all(0 < end - first <= 16 for first, end in windows)


def test_a_window_is_around_the_start_of_the_reply() -> None:
    made = columns(4096, 100)
    (window,) = [w for w in viewdata.windows(made, 512) if w[0] < 4095 < w[1] - 1]
    assert made[window[0]].number == -256
    assert viewdata.window_label(made, window) == "position 3,840 to step 100"
    assert viewdata.window_label(made, (0, 3)) == "positions 1 to 3 of the prompt"
    assert viewdata.window_label(made, (4100, 4105)) == "steps 6 to 10 of 100"


def test_a_map_of_one_side_has_no_seam() -> None:
    assert viewdata.column_data(columns(1, 3))["reply"] is None
    assert viewdata.column_data(columns(4, 0))["reply"] is None
