"""Where the model looked, as the elements get it: each weight on its position, none made up."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dashboard.viewdata import attention as viewdata
from dashboard.viewdata.map_columns import map_columns
from oki_trace.records import AttentionPoints, Prompt, StepSummary, TensorRecord
from oki_trace.store.reading.prompt_steps import PromptStep
from tests import builders


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def prompt() -> Prompt:
    return Prompt(
        text="<s>user: hi</s>",
        token_ids=(0, 1, 2, 3),
        tokens=("<s>", "user:", " hi", "</s>"),
        segments=("template", "template", "user", "template"),
    )


def said() -> list[StepSummary]:
    """A reply to ``prompt()``: its first token stands at position 4."""
    return [
        builders.summary(i, text, position=4 + i)
        for i, text in enumerate((" one", " two", " three"))
    ]


def pieces(position: int, weights: dict[int, float], without: Sequence[int] = ()) -> list:
    found = viewdata.without_positions(weights, without)
    return viewdata.evidence_data(prompt(), said(), position, found)["pieces"]


def test_evidence_is_what_the_model_saw_and_no_more() -> None:
    """A token at position p was chosen from what stands before p."""
    for steps_seen, position in ((0, 4), (1, 5), (2, 6)):
        kinds = [piece["kind"] for piece in pieces(position, {})]
        assert kinds == ["template", "template", "user", "template", *["reply"] * steps_seen]


def test_evidence_puts_each_weight_on_its_position() -> None:
    found = pieces(6, {2: 0.1, 5: 0.4})
    assert [piece["value"] for piece in found] == [0, 0, 0.25, 0, 0, 1.0]
    assert "hi" in found[2]["text"]
    assert "two" in found[5]["text"]
    assert "position 5" in found[5]["title"]
    assert "0.4000" in found[5]["title"]


def test_a_weight_on_a_line_end_can_be_seen() -> None:
    """A line end alone has no width to be shaded."""
    broken = replace(prompt(), tokens=("<s>", "user:", "\n", "</s>"))
    found = viewdata.evidence_data(broken, said(), 4, viewdata.without_positions({2: 1.0}))[
        "pieces"
    ][2]
    assert found["text"].endswith("\n")
    assert found["text"].strip()


def test_what_is_left_out_is_told_and_the_rest_adds_up_to_one() -> None:
    weights = {0: 0.6, 2: 0.1, 3: 0.1, 4: 0.2}
    found = viewdata.without_positions(weights, viewdata.sink_positions(prompt(), said()))
    assert found.scaled
    assert found.shown == pytest.approx({2: 1 / 3, 4: 2 / 3})
    assert found.left_out == pytest.approx({0: 0.6, 3: 0.1})
    told = viewdata.evidence_notes(found, viewdata.MEAN, 4, None)
    assert "60 %" in told and "10 %" in told and "add up to 1" in told
    first = pieces(5, weights, [0])[0]
    assert first["value"] == 0
    assert "0.6000, left out" in first["title"]


def test_a_maximum_over_heads_is_not_scaled() -> None:
    found = viewdata.without_positions({0: 0.9, 2: 0.8}, [0], scale=False)
    assert found.shown == {2: 0.8}
    assert "not scaled" in viewdata.evidence_notes(found, viewdata.MAXIMUM, 2, None)


def test_nothing_left_out_is_nothing_scaled() -> None:
    found = viewdata.without_positions({0: 0.5, 1: 0.25})
    assert found.shown == {0: 0.5, 1: 0.25}
    assert not found.scaled
    assert "Left out" not in viewdata.evidence_notes(found, viewdata.MEAN, 2, None)


def test_weights_that_are_no_numbers_are_left_alone() -> None:
    assert viewdata.without_positions({0: float("nan"), 1: 0.5}).shown == {1: 0.5}


def test_without_full_tensors_there_is_no_head_to_choose() -> None:
    assert viewdata.head_options(None) == [viewdata.MEAN]
    assert len(viewdata.head_options(9)) == 12
    found = viewdata.without_positions({1: 1.0})
    assert "were not kept" in viewdata.evidence_notes(
        found, viewdata.MEAN, 1, "which were not kept"
    )


def test_parked_are_the_first_the_template_and_special_tokens() -> None:
    steps = [*said(), builders.summary(3, "<|im_end|>", position=7, is_special=True)]
    assert viewdata.sink_positions(prompt(), steps) == {0, 1, 3, 7}


def tensor(rng: np.random.Generator) -> TensorRecord:
    array = rng.random((2, 3, 5)).astype(np.float32)
    return TensorRecord("attentions", array, "float32", (1, 4), 2)


def test_a_head_is_read_from_its_own_layer(rng: np.random.Generator) -> None:
    full = tensor(rng)
    for layer, row in ((1, 0), (4, 1)):
        for head, expected in (
            (viewdata.MEAN_EVERYWHERE, full.array[row].mean(0)),
            (viewdata.MAXIMUM, full.array[row].max(0)),
            ("head 2", full.array[row, 2]),
        ):
            weights, offset = viewdata.head_weights(full, layer, head)
            assert offset == 2
            np.testing.assert_array_equal(weights, expected)


def test_bfloat16_bits_are_read_as_the_numbers_they_are(rng: np.random.Generator) -> None:
    exact = tensor(rng)
    bits = (exact.array.view(np.uint32) >> 16).astype(np.uint16)
    half = replace(exact, array=bits, dtype="bfloat16")
    weights, _ = viewdata.head_weights(half, 1, "head 0")
    np.testing.assert_allclose(weights, exact.array[0, 0], rtol=1 / 128)


def test_positions_count_from_the_offset() -> None:
    weights = np.array([0.0, 0.25, 0.75], dtype=np.float32)
    assert viewdata.weights_by_position(weights, 10) == {11: 0.25, 12: 0.75}


def test_full_points_are_every_weight_that_is_not_nought(rng: np.random.Generator) -> None:
    full = tensor(rng)
    array = np.array(full.array)
    array[:, :, 3] = 0
    found = viewdata.full_attention_points(
        [(7, replace(full, array=array)), (9, full)], 4, "head 1"
    )
    assert found.step_index.tolist() == [7] * 4 + [9] * 5
    assert found.position.tolist() == [2, 3, 4, 6, 2, 3, 4, 5, 6]
    assert found.weight[0] == array[1, 1, 0]
    assert not len(viewdata.full_attention_points([], 4, "head 1").weight)


def test_the_attention_map_names_all_positions_that_were_there() -> None:
    found = AttentionPoints(np.array([1, 2]), np.array([0, 5]), np.array([0.5, 0.25], np.float32))
    columns = map_columns(1, 4, {}, said()[1:3])
    data = viewdata.attention_map(prompt(), said(), found, columns, frozenset({0}))
    assert [s["index"] for s in data["steps"]] == [1, 2]
    assert data["positions"] == ["<s>", "user:", "␣hi", "</s>", "␣one", "␣two"]
    assert data["seam"] == 4
    assert data["without"] == [0]


def test_points_of_a_prompt_and_its_reply_have_the_columns_of_both() -> None:
    """Positions 2 and 3 of a prompt of four tokens, then step 0; step 9 is not in the map."""
    before = AttentionPoints(np.array([2, 3]), np.array([0, 1]), np.array([0.5, 0.25], np.float32))
    after = AttentionPoints(np.array([0, 9]), np.array([2, 3]), np.array([0.75, 1], np.float32))
    points = viewdata.joined_points([(before, -4), (after, 0)])
    assert points.step_index.tolist() == [-2, -1, 0, 9]
    given = {
        at: PromptStep(1, replace(builders.summary(0), step_index=-1, position=at, origin="given"))
        for at in (2, 3)
    }
    columns = map_columns(1, 4, given, said()[:1])
    data = viewdata.attention_map(prompt(), said(), points, columns, frozenset())
    column = np.frombuffer(base64.b64decode(data["points"]["column"]), "<i4")
    assert column.tolist() == [0, 1, 2, -1]
    assert data["reply"] == 2
