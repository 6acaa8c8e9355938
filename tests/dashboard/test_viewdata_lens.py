"""What the layers would have said, as the elements get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dashboard.viewdata import lens as viewdata
from dashboard.viewdata.map_columns import map_columns
from oki_trace.records import Lens, LensGrid, Step
from oki_trace.sanitize import visible
from tests import builders

LAYERS = 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def settling(rng: np.random.Generator, ranks: Sequence[int]) -> Lens:
    return replace(builders.lens(0, rng, layers=LAYERS), chosen_rank=np.array(ranks))


def test_lens_has_the_last_layer_on_top(rng: np.random.Generator) -> None:
    lens = settling(rng, [9, 1_234, 1, 1])
    rows = viewdata.lens_data(builders.step(0, rng), lens)["rows"]
    assert [row["layer"] for row in rows] == [3, 2, 1, 0]
    assert [row["rank"] for row in rows] == [1, 1, 1234, 9]
    assert [row["settled"] for row in rows] == [False, True, False, False]
    for row in rows:
        layer = row["layer"]
        assert [c["prob"] for c in row["cells"]] == lens.probs[layer].tolist()
        assert [c["text"] for c in row["cells"]] == [visible(t) for t in lens.tokens[layer]]


def test_lens_marks_the_chosen_token_by_its_id(rng: np.random.Generator) -> None:
    """Two tokens may read the same."""
    ids = np.full((4, 5), 7)
    ids[:, 1] = 8
    lens = replace(
        settling(rng, [1, 1, 1, 1]), token_ids=ids, tokens=((" a", " a", " a", " a", " a"),) * 4
    )
    step = replace(builders.step(0, rng), token_id=8, token=" a")
    cells = viewdata.lens_data(step, lens)["rows"][0]["cells"]
    assert [c["chosen"] for c in cells][:3] == [False, True, False]


def test_lens_that_never_settles_marks_no_layer(rng: np.random.Generator) -> None:
    data = viewdata.lens_data(builders.step(0, rng), settling(rng, [1, 1, 1, 2]))
    assert not any(row["settled"] for row in data["rows"])


# ---------------------------------------------------------------- promoted, suppressed


def two_layers(
    ids: Sequence[Sequence[int]], probs: Sequence[Sequence[float]], chosen: Sequence[float]
) -> Lens:
    return Lens(
        step_index=0,
        token_ids=np.array(ids),
        tokens=tuple(tuple(f" t{i}" for i in row) for row in ids),
        logits=np.zeros((2, len(ids[0])), np.float32),
        probs=np.array(probs, np.float32),
        entropy=np.zeros(2, np.float32),
        chosen_rank=np.array([2, 1]),
        chosen_prob=np.array(chosen, np.float32),
        kl=np.zeros(2, np.float32),
    )


def chose(rng: np.random.Generator, token_id: int) -> Step:
    return replace(builders.step(0, rng), token_id=token_id, token=f" t{token_id}")


def test_changes_of_tokens_in_both_layers_are_exact(rng: np.random.Generator) -> None:
    lens = two_layers([[1, 2], [2, 1]], [[0.6, 0.3], [0.8, 0.1]], [0.3, 0.8])
    (row,) = viewdata.changes_data(chose(rng, 2), lens)["rows"]
    assert row["layer"] == 1
    assert [(c["text"], c["exact"], c["chosen"]) for c in row["up"]] == [("␣t2", True, True)]
    assert row["up"][0]["delta"] == pytest.approx(0.5)
    assert row["down"][0]["delta"] == pytest.approx(-0.5)


def test_changes_of_tokens_in_one_layer_are_bounds(rng: np.random.Generator) -> None:
    """What is not among the kept ones has at most the probability of the last that is."""
    lens = two_layers([[1, 2], [3, 1]], [[0.6, 0.2], [0.5, 0.4]], [0.6, 0.4])
    (row,) = viewdata.changes_data(chose(rng, 1), lens)["rows"]
    up, down = row["up"][0], row["down"]
    assert (up["text"], up["exact"]) == ("␣t3", False)
    assert up["delta"] == pytest.approx(0.3)
    assert up["shown"].startswith("≥")
    # t2 had 0.2 and now has at most 0.4: it may have risen, so nothing is said of it.
    assert [c["text"] for c in down] == ["␣t1"]


def test_the_chosen_token_is_known_though_no_layer_kept_it(rng: np.random.Generator) -> None:
    lens = two_layers([[1], [1]], [[0.9], [0.9]], [0.01, 0.08])
    (row,) = viewdata.changes_data(chose(rng, 5), lens)["rows"]
    assert [(c["text"], c["exact"]) for c in row["up"]] == [("␣t5", True)]


# ------------------------------------------------------------------------------ curves


def test_curves_have_gaps_where_nothing_was_kept(rng: np.random.Generator) -> None:
    lens = two_layers([[1, 2], [2, 3]], [[0.6, 0.3], [0.8, 0.1]], [0.3, 0.8])
    step = chose(rng, 2)
    step = replace(step, topk=replace(step.topk, token_ids=np.array([2, 3]), tokens=(" t2", " t3")))
    rows = viewdata.curve_rows(step, lens, ["␣t1", "␣nowhere"])
    found = {(r["token"], r["layer"]): (r["kind"], r["rank"], r["prob"]) for r in rows}
    assert found["␣t2", 0] == ("chosen", 2, pytest.approx(0.3))
    assert found["␣t3", 0] == ("runner-up", None, None)
    assert found["␣t3", 1] == ("runner-up", 2, pytest.approx(0.1))
    assert found["␣t1", 0] == ("pinned", 1, pytest.approx(0.6))
    assert found["␣t1", 1] == ("pinned", None, None)
    assert found["␣nowhere", 1] == ("pinned", None, None)


def test_a_pin_that_is_shown_already_is_shown_once(rng: np.random.Generator) -> None:
    lens = two_layers([[1, 2], [2, 1]], [[0.6, 0.3], [0.8, 0.1]], [0.3, 0.8])
    step = chose(rng, 2)
    runner_up = viewdata.short_label(step.topk.tokens[1])
    rows = viewdata.curve_rows(step, lens, ["␣t2", runner_up])
    assert len(rows) == len({(r["token"], r["layer"]) for r in rows})


def test_labels_are_short_whatever_the_token(rng: np.random.Generator) -> None:
    assert len(viewdata.short_label("W" * 20_000)) == viewdata.LABEL_LENGTH
    step = builders.step(0, rng, with_lens=True)
    assert step.lens is not None
    offered = viewdata.pinnable_tokens(step, step.lens)
    assert len(offered) == len(set(offered))
    assert viewdata.short_label(step.token) not in offered


# --------------------------------------------------------------------------------- map


def numbers(text: str, kind: str) -> np.ndarray:
    import base64

    return np.frombuffer(base64.b64decode(text), kind)


def test_the_map_has_a_column_a_step_and_a_row_a_layer() -> None:
    grid = LensGrid(
        step_index=np.array([1, 2]),
        tokens=(" a", " b"),
        top=np.array([[0, 1], [1, 1]]),
        top_id=np.array([[7, 41], [8, 8]]),
        top_prob=np.array([[0.5, 0.25], [1, 0.75]], np.float32),
        entropy=np.zeros((2, 2), np.float32),
        chosen_rank=np.array([[5, 1], [49_000, 2]]),
        chosen_prob=np.zeros((2, 2), np.float32),
        kl=np.zeros((2, 2), np.float32),
    )
    steps = [builders.summary(i, f" {i}", settle_layer=None if i == 2 else 1) for i in range(4)]
    data = viewdata.lens_map(grid, map_columns(1, 5, {}, steps))
    assert [s["index"] for s in data["steps"]] == [1, 2]
    assert data["layers"] == 2
    assert data["words"] == ["␣a", "␣b"]
    assert data["settled"] == [1, -1]
    assert numbers(data["top"], "<u4").tolist() == [0, 1, 1, 1]
    assert numbers(data["same"], "u1").tolist() == [0, 1, 0, 0]
    assert numbers(data["prob"], "<f4").tolist() == [0.5, 0.25, 1, 0.75]
    assert numbers(data["rank"], "<u4").tolist() == [5, 1, 49_000, 2]
    assert data["reply"] is None


def lens_grid(steps: list[int], tokens: tuple[str, ...], top: list[list[int]]) -> LensGrid:
    """A grid with these tokens; each token's id is ten times its number."""
    shape = np.array(top)
    floats = shape.astype(np.float32)
    return LensGrid(
        step_index=np.array(steps),
        tokens=tokens,
        top=shape,
        top_id=shape * 10,
        top_prob=floats,
        entropy=floats,
        chosen_rank=shape + 1,
        chosen_prob=floats,
        kl=floats,
    )


def test_grids_of_a_prompt_and_its_reply_are_one() -> None:
    """The first with positions 2 and 3 of a prompt of four tokens."""
    before = lens_grid([2, 3], (" a", " b"), [[0, 1], [1, 1]])
    after = lens_grid([0, 1], (" b", " c"), [[0, 1], [1, 0]])
    joined = viewdata.joined_lens([(before, -4), (after, 0)])
    assert joined.step_index.tolist() == [-2, -1, 0, 1]
    assert joined.tokens == (" a", " b", " c")
    assert joined.top.tolist() == [[0, 1], [1, 1], [1, 2], [2, 1]]
    assert joined.top_id.tolist() == [[0, 10], [10, 10], [0, 10], [10, 0]]
    assert joined.kl.tolist() == [[0, 1], [1, 1], [0, 1], [1, 0]]
    empty = lens_grid([], (), np.empty((0, 0), np.int64).tolist())
    empty = replace(empty, top=np.empty((0, 0), np.int64))
    assert viewdata.joined_lens([(before, -4), (empty, 0)]).step_index.tolist() == [-2, -1]
    assert not len(viewdata.joined_lens([(empty, -4), (empty, 0)]).step_index)
    deeper = lens_grid([7], (" d",), [[0, 0, 0]])
    assert viewdata.joined_lens([(deeper, -9), (after, 0)]).step_index.tolist() == [0, 1]
