"""What the page's elements are given: numbers, texts and positions in the right places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import builders
import numpy as np
import pytest
from stories import without_numbers

from dashboard import shapes
from oki_trace.records import Lens, Prompt, Step, StepSummary

LAYERS = 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def summary(index: int = 0, token: str = " the", **values: Any) -> StepSummary:
    given: dict[str, Any] = {
        "id": index + 1,
        "step_index": index,
        "position": 6 + index,
        "token_id": 40 + index,
        "token": token,
        "token_bytes": token.encode(errors="surrogatepass"),
        "is_special": False,
        "prob": 0.5,
        "logprob": float(np.log(0.5)),
        "entropy": 1.5,
        "rank": 1,
        "margin": 0.25,
        "settle_layer": 2,
    }
    return StepSummary(**{**given, **values})


def reply(steps: Sequence[StepSummary], **values: Any) -> shapes.Json:
    given: dict[str, Any] = {
        "colour": "surprisal",
        "layers": LAYERS,
        "chosen": None,
        "live": False,
        "keys": False,
        "status": "complete",
        "bad": False,
    }
    return shapes.reply_data(steps, **{**given, **values})


# ------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("the", "the"),
        ("\n", "⏎"),
        ("a\t b", "a⇥␣b"),
        ("", "∅"),
        ("\u202eabc", "<U+202E>abc"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("\x00", "<U+0000>"),
        ("\u200b", "<U+200B>"),
        ("\u00a0", "<U+00A0>"),
        ("\u2028", "<U+2028>"),
        ("\ud800", "<U+D800>"),
        ("<b>&amp;", "<b>&amp;"),
        ("é🙂字", "é🙂字"),
    ],
)
def test_visible_shows_what_cannot_be_seen(token: str, shown: str) -> None:
    assert shapes.visible(token) == shown


def bytewise(*parts: bytes) -> list[StepSummary]:
    return [
        summary(i, part.decode("utf-8", "replace"), token_bytes=part)
        for i, part in enumerate(parts)
    ]


def test_running_text_puts_a_character_with_the_token_that_ends_it() -> None:
    smile = "🙂".encode()
    steps = bytewise(b" ok", smile[:1], smile[1:3], smile[3:] + b"!", b" bye")
    assert shapes.running_text(steps) == [" ok", "", "", "🙂!", " bye"]


def test_running_text_marks_what_is_no_character() -> None:
    assert shapes.running_text(bytewise(b"a", b"\xff", b"b")) == ["a", "\ufffd", "b"]
    # Half a character and then something else: one mark, nothing lost.
    assert "".join(shapes.running_text(bytewise(b"\xf0\x9f", b"b"))) == "\ufffdb"


def test_running_text_is_the_text_of_the_reply() -> None:
    text = "Ça va? 日本語 🙂👩‍🚀 end"
    raw = text.encode()
    steps = bytewise(*(raw[i : i + 2] for i in range(0, len(raw), 2)))
    assert "".join(shapes.running_text(steps)) == text


# ----------------------------------------------------------------------- colours


def test_surprisal_is_shaded_against_the_most_surprising_token() -> None:
    steps = [summary(0, logprob=-0.5), summary(1, logprob=-2.0), summary(2, logprob=0.0)]
    assert shapes.scale(steps, "surprisal", LAYERS) == ([0.25, 1.0, 0.0], "0", "2.0 nats")


def test_entropy_has_its_own_scale() -> None:
    steps = [summary(0, entropy=1.0), summary(1, entropy=4.0)]
    assert shapes.scale(steps, "entropy", LAYERS) == ([0.25, 1.0], "0", "4.0 nats")


@pytest.mark.parametrize("colour", ["surprisal", "entropy"])
def test_small_differences_are_not_blown_up(colour: shapes.Colour) -> None:
    """A reply without doubt stays pale: the scale ends at 1 nat at the least."""
    steps = [summary(0, logprob=-0.01, entropy=0.01), summary(1, logprob=-0.02, entropy=0.02)]
    shades, _, high = shapes.scale(steps, colour, LAYERS)
    assert shades == pytest.approx([0.01, 0.02])
    assert high == "1.0 nats"


def test_margin_is_darkest_at_a_tie() -> None:
    steps = [summary(0, margin=1.0), summary(1, margin=0.0), summary(2, margin=0.75)]
    shades, low, high = shapes.scale(steps, "margin", LAYERS)
    assert shades == [0.0, 1.0, 0.25]
    assert (low, high) == ("1", "0 (a near tie)")


def test_settle_layer_is_darkest_at_the_last_and_absent_without_a_lens() -> None:
    steps = [summary(0, settle_layer=0), summary(1, settle_layer=3), summary(2, settle_layer=None)]
    shades, _, high = shapes.scale(steps, "settle layer", LAYERS)
    assert shades == [0.0, 1.0, None]
    assert high == "3"


@pytest.mark.parametrize("colour", shapes.COLOURS)
def test_every_colour_stays_within_its_scale(colour: shapes.Colour) -> None:
    rng = np.random.default_rng(3)
    steps = [
        summary(
            i,
            logprob=-float(rng.exponential(3)),
            entropy=float(rng.exponential(3)),
            margin=float(rng.random()),
            settle_layer=int(rng.integers(0, LAYERS + 1)),
        )
        for i in range(50)
    ]
    shades, _, _ = shapes.scale(steps, colour, LAYERS)
    assert all(shade is not None and 0 <= shade <= 1 for shade in shades)


@pytest.mark.parametrize("colour", shapes.COLOURS)
def test_no_steps_have_no_shades(colour: shapes.Colour) -> None:
    assert shapes.scale([], colour, 0)[0] == []


# --------------------------------------------------------------------- the reply


def test_reply_gives_each_token_its_text_shade_and_numbers() -> None:
    steps = [summary(0, "The", logprob=-1.0), summary(1, " cat", logprob=-2.0, rank=7)]
    data = reply(steps, chosen=1, live=True, keys=True, status="running")
    assert [t["text"] for t in data["tokens"]] == ["The", " cat"]
    assert [t["value"] for t in data["tokens"]] == [0.5, 1.0]
    assert not any(t["mark"] for t in data["tokens"])
    assert "rank 7" in data["tokens"][1]["title"]
    assert "surprisal 2.00 nats" in data["tokens"][1]["title"]
    assert (data["chosen"], data["live"], data["keys"]) == (1, True, True)
    assert (data["name"], data["low"], data["high"]) == ("surprisal", "0", "2.0 nats")
    assert data["status"] == "running"


def test_reply_marks_what_is_no_text() -> None:
    half = "é".encode()[:1]
    steps = [
        summary(0, "<|im_end|>", is_special=True),
        summary(1, "\ufffd", token_bytes=half),
        summary(2, "", token_bytes=b""),
    ]
    tokens = reply(steps)["tokens"]
    assert [t["mark"] for t in tokens] == [True, True, True]
    assert tokens[0]["text"] == "<|im_end|>"
    assert tokens[1]["text"] == tokens[2]["text"] == "◌"


def test_a_line_end_is_something_to_click() -> None:
    """It stays a line end, and has a mark: alone it would be no wider than nothing."""
    for token in ("\n", "\n\n", " \n"):
        text = reply([summary(0, token)])["tokens"][0]["text"]
        assert text.strip()
        assert text.count("\n") == token.count("\n")


def test_an_empty_reply_has_no_legend() -> None:
    data = reply([], status="queued")
    assert data["tokens"] == []
    assert data["name"] == ""


def test_most_surprising_is_the_least_likely_token() -> None:
    steps = [summary(0, logprob=-0.1), summary(1, logprob=-3.0), summary(2, logprob=-0.2)]
    assert shapes.most_surprising(steps) == 1
    assert shapes.most_surprising([]) is None


# ---------------------------------------------------------------------- one step


def test_facts_are_the_numbers_of_the_step(rng: np.random.Generator) -> None:
    step = builders.step(2, rng, token="\n")
    step = replace(step, prob=0.125, logprob=-2.0794, entropy=2.5, rank=3, sampled_prob=None)
    data = shapes.facts_data(step, summary(2, settle_layer=1), 9)
    assert data["where"] == "step 3 of 9 · position 8"
    assert data["what"] == "⏎"
    assert {f["name"]: f["value"] for f in data["facts"]} == {
        "prob": "0.125",
        "rank": "3",
        "surprisal": "2.08 nats",
        "entropy": "2.50 nats",
        "settled": "layer 1",
    }


def test_facts_show_what_sampling_did_beside_the_models_own(rng: np.random.Generator) -> None:
    step = replace(builders.step(0, rng), prob=0.25, sampled_prob=0.75)
    facts = shapes.facts_data(step, summary(0, settle_layer=None), 1)["facts"]
    assert [(f["name"], f["value"]) for f in facts[:2]] == [("prob", "0.250"), ("sampled", "0.750")]
    assert facts[-1]["value"] == "–"


def test_bars_are_the_candidates_in_their_order(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    data = shapes.bars_data(step)
    assert [row["prob"] for row in data["rows"]] == step.topk.probs.tolist()
    assert [row["text"] for row in data["rows"]] == [shapes.visible(t) for t in step.topk.tokens]
    assert [row["chosen"] for row in data["rows"]] == [True, *[False] * 9]
    assert data["rows"][1]["title"].startswith("rank 2 · ")
    assert data["sampled"]


def test_bars_of_a_greedy_step_have_one_probability(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    data = shapes.bars_data(replace(step, topk=replace(step.topk, sampled_probs=None)))
    assert not data["sampled"]
    assert all(row["sampled"] is None for row in data["rows"])


def test_bars_show_what_sampling_removed(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    cut = np.zeros(10, dtype=np.float32)
    cut[0] = 1
    data = shapes.bars_data(replace(step, topk=replace(step.topk, sampled_probs=cut)))
    assert [row["sampled"] for row in data["rows"]] == [1.0, *[0.0] * 9]


# ---------------------------------------------------------------------- evidence


def prompt() -> Prompt:
    return Prompt(
        text="<s>user: hi</s>",
        token_ids=(0, 1, 2, 3),
        tokens=("<s>", "user:", " hi", "</s>"),
        segments=("template", "template", "user", "template"),
    )


def said() -> list[StepSummary]:
    """A reply to ``prompt()``: its first token stands at position 4."""
    return [summary(i, text, position=4 + i) for i, text in enumerate((" one", " two", " three"))]


def test_evidence_is_what_the_model_saw_and_no_more() -> None:
    """A token at position p was chosen from what stands before p."""
    for steps_seen, position in ((0, 4), (1, 5), (2, 6)):
        data = shapes.evidence_data(prompt(), said(), position, {})
        assert len(data["pieces"]) == position
        kinds = [piece["kind"] for piece in data["pieces"]]
        assert kinds == ["template", "template", "user", "template", *["reply"] * steps_seen]
        assert data["seam"] == 4


def test_evidence_puts_each_weight_on_its_position() -> None:
    data = shapes.evidence_data(prompt(), said(), 6, {2: 0.1, 5: 0.4})
    assert [piece["value"] for piece in data["pieces"]] == [0, 0, 0.25, 0, 0, 1.0]
    assert "hi" in data["pieces"][2]["text"]
    assert "two" in data["pieces"][5]["text"]
    assert "position 5" in data["pieces"][5]["title"]
    assert "0.4000" in data["pieces"][5]["title"]


def test_evidence_without_weights_is_plain_text() -> None:
    pieces = shapes.evidence_data(prompt(), said(), 4, {})["pieces"]
    assert [piece["value"] for piece in pieces] == [0, 0, 0, 0]


def test_a_weight_on_a_line_end_can_be_seen() -> None:
    """A line end alone has no width to be shaded."""
    broken = replace(prompt(), tokens=("<s>", "user:", "\n", "</s>"))
    piece = shapes.evidence_data(broken, said(), 4, {2: 1.0})["pieces"][2]
    assert piece["text"].endswith("\n")
    assert piece["text"].strip()


def test_positions_counts_from_the_offset() -> None:
    weights = np.array([0.0, 0.25, 0.75], dtype=np.float32)
    assert shapes.positions(weights, 10) == {11: 0.25, 12: 0.75}


# -------------------------------------------------------------------------- lens


def settling(rng: np.random.Generator, ranks: Sequence[int]) -> Lens:
    return replace(builders.lens(0, rng, layers=LAYERS), chosen_rank=np.array(ranks))


def test_lens_has_the_last_layer_on_top(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    lens = settling(rng, [9, 1_234, 1, 1])
    data = shapes.lens_data(step, lens)
    assert [row["layer"] for row in data["rows"]] == [3, 2, 1, 0]
    assert [row["rank"] for row in data["rows"]] == [1, 1, 1234, 9]
    assert [row["settled"] for row in data["rows"]] == [False, True, False, False]
    for row in data["rows"]:
        layer = row["layer"]
        count = len(row["cells"])
        assert 1 <= count <= 5
        assert [c["prob"] for c in row["cells"]] == lens.probs[layer, :count].tolist()
        shown = [shapes.visible(t) for t in lens.tokens[layer][:count]]
        assert [c["text"] for c in row["cells"]] == shown


def test_lens_marks_the_chosen_token_by_its_id(rng: np.random.Generator) -> None:
    """Two tokens may read the same."""
    lens = replace(
        settling(rng, [1, 1, 1, 1]),
        token_ids=np.full((4, 5), 7),
        tokens=((" a", " a", " a", " a", " a"),) * 4,
    )
    ids = lens.token_ids.copy()
    ids[:, 1] = 8
    step = replace(builders.step(0, rng), token_id=8, token=" a")
    data = shapes.lens_data(step, replace(lens, token_ids=ids))
    assert [c["chosen"] for c in data["rows"][0]["cells"]][:3] == [False, True, False]


def test_lens_that_never_settles_marks_no_layer(rng: np.random.Generator) -> None:
    data = shapes.lens_data(builders.step(0, rng), settling(rng, [1, 1, 1, 2]))
    assert not any(row["settled"] for row in data["rows"])


def test_lens_takes_as_many_columns_as_were_kept(rng: np.random.Generator) -> None:
    lens = builders.lens(0, rng, layers=LAYERS, k=1)
    data = shapes.lens_data(builders.step(0, rng), lens)
    assert [len(row["cells"]) for row in data["rows"]] == [1, 1, 1, 1]


# --------------------------------------------------------------------------- map


def test_map_has_a_column_a_step_and_a_row_a_layer(rng: np.random.Generator) -> None:
    steps = [builders.step(i, rng, token=f" {i}", with_lens=True) for i in range(4)]
    layers = range(LAYERS, -1, -1)
    data = shapes.map_data(steps, layers, 2)
    assert [s["index"] for s in data["steps"]] == [0, 1, 2, 3]
    assert data["layers"] == [3, 2, 1, 0]
    assert data["chosen"] == 2
    assert len(data["cells"]) == 4
    for layer, row in zip(layers, data["cells"], strict=True):
        assert len(row) == 4
        for step, cell in zip(steps, row, strict=True):
            assert step.lens is not None
            assert cell["text"] == shapes.visible(step.lens.tokens[layer][0])
            assert cell["prob"] == pytest.approx(float(step.lens.probs[layer, 0]), abs=5e-4)
            assert cell["same"] == (int(step.lens.token_ids[layer, 0]) == step.token_id)
            assert cell["settled"] == (step.lens.settle_layer == layer)


def test_map_waits_for_lenses_that_trail(rng: np.random.Generator) -> None:
    steps = [builders.step(i, rng, with_lens=i < 2) for i in range(4)]
    data = shapes.map_data(steps, range(LAYERS, -1, -1), 3)
    assert [s["index"] for s in data["steps"]] == [0, 1]
    assert all(len(row) == 2 for row in data["cells"])


def sendable(step: Step, shown: StepSummary) -> bool:
    """Whether all that is made of a step is plain JSON, as the browser reads it."""
    assert step.lens is not None
    for data in (
        *(reply([shown], colour=colour) for colour in shapes.COLOURS),
        shapes.facts_data(step, shown, 1),
        shapes.bars_data(step),
        shapes.lens_data(step, step.lens),
        shapes.map_data([step], range(LAYERS, -1, -1), 0),
        shapes.evidence_data(prompt(), [shown], 7, {0: 1.0}),
    ):
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return True


def test_numpy_numbers_and_lone_surrogates_can_be_sent(rng: np.random.Generator) -> None:
    step = builders.step(0, rng, token="\ud800", with_lens=True)
    assert sendable(step, summary(0, "\ud800"))


def test_numbers_that_are_not_known_can_be_sent(rng: np.random.Generator) -> None:
    nan = float("nan")
    step = without_numbers(builders.step(0, rng, with_lens=True))
    assert sendable(step, summary(0, prob=nan, logprob=nan, entropy=nan, margin=nan))


def test_a_token_of_unknown_surprisal_leaves_the_others_theirs() -> None:
    nan = float("nan")
    steps = [summary(0, logprob=nan), summary(1, logprob=-2.0), summary(2, logprob=-1.0)]
    assert shapes.scale(steps, "surprisal", LAYERS) == ([None, 1.0, 0.5], "0", "2.0 nats")
    assert shapes.most_surprising(steps) == 1
