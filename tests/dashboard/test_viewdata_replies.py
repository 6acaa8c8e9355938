"""What the page's elements are given: numbers, texts and positions in the right places."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dashboard.viewdata import lens, replies, wording
from oki_trace.records import (
    Message,
    Part,
    Prompt,
    ReplyChecks,
    Role,
    Status,
    Step,
    StepSummary,
)
from tests import builders
from tests.dashboard import sample_stores

LAYERS = 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def reply(steps: Sequence[StepSummary], **values: Any) -> wording.Json:
    given: dict[str, Any] = {
        "conversation": 1,
        "message": 2,
        "colour": "surprisal",
        "layers": LAYERS,
        "live": False,
        "status": "complete",
        "bad": False,
    }
    return replies.reply_data(steps, **{**given, **values})


# ------------------------------------------------------------------------ texts


def bytewise(*parts: bytes) -> list[StepSummary]:
    return [
        builders.summary(i, part.decode("utf-8", "replace"), token_bytes=part)
        for i, part in enumerate(parts)
    ]


def test_running_text_puts_a_character_with_the_token_that_ends_it() -> None:
    smile = "🙂".encode()
    steps = bytewise(b" ok", smile[:1], smile[1:3], smile[3:] + b"!", b" bye")
    assert replies.token_texts(steps) == [" ok", "", "", "🙂!", " bye"]


def test_running_text_marks_what_is_no_character() -> None:
    assert replies.token_texts(bytewise(b"a", b"\xff", b"b")) == ["a", "\ufffd", "b"]
    # Half a character and then something else: one mark, nothing lost.
    assert "".join(replies.token_texts(bytewise(b"\xf0\x9f", b"b"))) == "\ufffdb"


def test_running_text_is_the_text_of_the_reply() -> None:
    text = "Ça va? 日本語 🙂👩‍🚀 end"
    raw = text.encode()
    steps = bytewise(*(raw[i : i + 2] for i in range(0, len(raw), 2)))
    assert "".join(replies.token_texts(steps)) == text


# ----------------------------------------------------------------------- colours


def test_surprisal_is_shaded_against_the_most_surprising_token() -> None:
    steps = [
        builders.summary(0, logprob=-0.5),
        builders.summary(1, logprob=-2.0),
        builders.summary(2, logprob=0.0),
    ]
    assert replies.shades(steps, "surprisal", LAYERS) == ([0.25, 1.0, 0.0], "0", "2.0 nats")


def test_entropy_has_its_own_scale() -> None:
    steps = [builders.summary(0, entropy=1.0), builders.summary(1, entropy=4.0)]
    assert replies.shades(steps, "entropy", LAYERS) == ([0.25, 1.0], "0", "4.0 nats")


@pytest.mark.parametrize("colour", ["surprisal", "entropy"])
def test_small_differences_are_not_blown_up(colour: replies.Colour) -> None:
    """A reply without doubt stays pale: the scale ends at 1 nat at the least."""
    steps = [
        builders.summary(0, logprob=-0.01, entropy=0.01),
        builders.summary(1, logprob=-0.02, entropy=0.02),
    ]
    shades, _, high = replies.shades(steps, colour, LAYERS)
    assert shades == pytest.approx([0.01, 0.02])
    assert high == "1.0 nats"


def test_margin_is_darkest_at_a_tie() -> None:
    steps = [
        builders.summary(0, margin=1.0),
        builders.summary(1, margin=0.0),
        builders.summary(2, margin=0.75),
    ]
    shades, low, high = replies.shades(steps, "margin", LAYERS)
    assert shades == [0.0, 1.0, 0.25]
    assert (low, high) == ("1", "0 (a near tie)")


def test_settle_layer_is_shaded_from_the_replys_own_lowest() -> None:
    steps = [
        builders.summary(0, settle_layer=1),
        builders.summary(1, settle_layer=3),
        builders.summary(2, settle_layer=None),
    ]
    assert replies.shades(steps, "settle layer", LAYERS) == ([0.0, 1.0, None], "layer 1", "3")
    alike = [builders.summary(0, settle_layer=3), builders.summary(1, settle_layer=3)]
    assert replies.shades(alike, "settle layer", LAYERS)[0] == [0.0, 0.0]


@pytest.mark.parametrize("colour", replies.COLOURS)
def test_every_colour_stays_within_its_scale(colour: replies.Colour) -> None:
    rng = np.random.default_rng(3)
    steps = [
        builders.summary(
            i,
            logprob=-float(rng.exponential(3)),
            entropy=float(rng.exponential(3)),
            margin=float(rng.random()),
            settle_layer=int(rng.integers(0, LAYERS + 1)),
        )
        for i in range(50)
    ]
    shades, _, _ = replies.shades(steps, colour, LAYERS)
    assert all(shade is not None and 0 <= shade <= 1 for shade in shades)


@pytest.mark.parametrize("colour", replies.COLOURS)
def test_no_steps_have_no_shades(colour: replies.Colour) -> None:
    assert replies.shades([], colour, 0)[0] == []


# --------------------------------------------------------------------- the reply


def test_reply_gives_each_token_its_text_shade_and_numbers() -> None:
    steps = [
        builders.summary(0, "The", logprob=-1.0),
        builders.summary(1, " cat", logprob=-2.0, rank=7),
    ]
    data = reply(steps, live=True, status="running")
    assert [t["text"] for t in data["tokens"]] == ["The", " cat"]
    assert [t["value"] for t in data["tokens"]] == [0.5, 1.0]
    assert not any(t["mark"] for t in data["tokens"])
    assert "rank 7" in data["tokens"][1]["title"]
    assert "surprisal 2.00 nats" in data["tokens"][1]["title"]
    assert (data["conversation"], data["message"], data["live"]) == (1, 2, True)
    assert (data["name"], data["low"], data["high"]) == ("surprisal", "0", "2.0 nats")
    assert data["status"] == "running"


def test_reply_marks_what_is_no_text() -> None:
    half = "é".encode()[:1]
    steps = [
        builders.summary(0, "<|im_end|>", is_special=True),
        builders.summary(1, "\ufffd", token_bytes=half),
        builders.summary(2, "", token_bytes=b""),
    ]
    tokens = reply(steps)["tokens"]
    assert [t["mark"] for t in tokens] == [True, True, True]
    assert tokens[0]["text"] == "<|im_end|>"
    assert tokens[1]["text"] == tokens[2]["text"] == "◌"


def test_a_line_end_is_something_to_click() -> None:
    """It stays a line end, and has a mark: alone it would be no wider than nothing."""
    for token in ("\n", "\n\n", " \n"):
        text = reply([builders.summary(0, token)])["tokens"][0]["text"]
        assert text.strip()
        assert text.count("\n") == token.count("\n")


def test_an_empty_reply_has_no_legend() -> None:
    data = reply([], status="queued")
    assert data["tokens"] == []
    assert data["name"] == ""


def test_most_surprising_is_the_least_likely_token() -> None:
    steps = [
        builders.summary(0, logprob=-0.1),
        builders.summary(1, logprob=-3.0),
        builders.summary(2, logprob=-0.2),
    ]
    assert replies.most_surprising_step(steps) == 1
    assert replies.most_surprising_step([]) is None


# ---------------------------------------------------------------------- one step


def test_facts_are_the_numbers_of_the_step(rng: np.random.Generator) -> None:
    step = builders.step(2, rng, token="\n")
    step = replace(step, prob=0.125, logprob=-2.0794, entropy=2.5, rank=3, sampled_prob=None)
    data = replies.facts_data(step, builders.summary(2, settle_layer=1), 9)
    assert data["where"] == "step 3 of 9 · position 8"
    assert data["what"] == "⏎"
    assert {f["name"]: f["value"] for f in data["facts"]} == {
        "prob": "0.125",
        "rank": "3",
        "surprisal": "2.08 nats",
        "entropy": "2.50 nats",
        "margin": f"{step.margin:.3f}",
        "settled": "layer 1",
    }


def test_facts_show_what_sampling_did_beside_the_models_own(rng: np.random.Generator) -> None:
    step = replace(builders.step(0, rng), prob=0.25, sampled_prob=0.75)
    facts = replies.facts_data(step, builders.summary(0, settle_layer=None), 1)["facts"]
    assert [(f["name"], f["value"]) for f in facts[:2]] == [("prob", "0.250"), ("sampled", "0.750")]
    assert facts[-1]["value"] == "–"


def test_bars_are_the_candidates_in_their_order(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    data = replies.candidates_data(step)
    assert [row["prob"] for row in data["rows"]] == step.topk.probs.tolist()
    assert [row["text"] for row in data["rows"]] == [replies.visible(t) for t in step.topk.tokens]
    assert [row["chosen"] for row in data["rows"]] == [True, *[False] * 9]
    assert data["rows"][1]["title"].startswith("rank 2 · ")
    assert data["sampled"]


def test_the_chosen_token_is_there_where_it_ranks_below_the_candidates(
    rng: np.random.Generator,
) -> None:
    step = replace(builders.step(0, rng), token_id=90_000, token=" rare", rank=27, prob=0.001)
    *kept, last = replies.candidates_data(step)["rows"]
    assert [row["rank"] for row in kept] == list(range(1, 11))
    assert not any(row["chosen"] for row in kept)
    assert (last["text"], last["rank"], last["chosen"]) == ("␣rare", 27, True)
    assert (last["prob"], last["sampled"]) == (0.001, step.sampled_prob)
    assert last["title"].startswith("rank 27 · id 90000 · ")


def test_bars_of_a_greedy_step_have_one_probability(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    data = replies.candidates_data(replace(step, topk=replace(step.topk, sampled_probs=None)))
    assert not data["sampled"]
    assert all(row["sampled"] is None for row in data["rows"])


def test_bars_show_what_sampling_removed(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    cut = np.zeros(10, dtype=np.float32)
    cut[0] = 1
    data = replies.candidates_data(replace(step, topk=replace(step.topk, sampled_probs=cut)))
    assert [row["sampled"] for row in data["rows"]] == [1.0, *[0.0] * 9]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (0.0004, "<0.001"), (0.0006, "0.001"), (1.0, "1.000"), (float("nan"), "–")],
)
def test_a_figure_is_never_nought_for_what_is_not(value: float, shown: str) -> None:
    assert wording.format_number(value, 3) == shown


def test_the_newest_step_is_the_last_with_a_lens() -> None:
    steps = [builders.summary(0), builders.summary(1), builders.summary(2, settle_layer=None)]
    assert replies.newest_step(steps) == 1
    assert replies.newest_step(steps[2:]) == 2
    assert replies.newest_step([]) is None


def test_the_decision_is_told_in_sentences(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    told = replies.decision_text(step, builders.generation())
    assert told.startswith(
        "Sampled with probability 0.500 from 12 tokens; noise +2.25 kept it above "
    )
    assert told.endswith("Greedy decoding would have chosen “␣greedy”.")
    effects = replies.effects_data(step)
    assert effects is not None
    assert [row[0] for row in effects["rows"]] == [
        "the model itself",
        "temperature 0.7",
        "top-p 0.9",
    ]
    beams = replace(builders.generation(), replaced=("beam search",))
    assert replies.decision_text(step, beams).endswith(
        "The reply was sampled in place of beam search."
    )


def test_a_decision_that_is_not_recorded_is_not_made_up(rng: np.random.Generator) -> None:
    step = replace(builders.step(0, rng), decision=None, sampled_prob=0.25)
    told = replies.decision_text(step, builders.generation())
    assert told == "Sampled with probability 0.250; the effect of each setting was not recorded."
    greedy = replace(builders.generation(), do_sample=False)
    assert replies.decision_text(step, greedy).startswith("Greedy")
    assert replies.decision_text(step, None).startswith("Greedy")
    assert replies.effects_data(step) is None


def test_a_long_token_does_not_fill_the_sentence(rng: np.random.Generator) -> None:
    step = builders.step(0, rng)
    assert step.decision is not None
    greedy = replace(step.decision.greedy, token="W" * 20_000)
    long = replace(step, decision=replace(step.decision, greedy=greedy))
    assert len(replies.decision_text(long, builders.generation())) < 300


def test_a_sentence_is_read_as_it_is() -> None:
    assert wording.sentence("no *norm* in [x](y)") == r"no \*norm\* in \[x\]\(y\)."


def sendable(step: Step, shown: StepSummary) -> bool:
    """Whether all that is made of a step is plain JSON, as the browser reads it."""
    assert step.lens is not None
    for data in (
        *(reply([shown], colour=colour) for colour in replies.COLOURS),
        replies.facts_data(step, shown, 1),
        replies.candidates_data(step),
        lens.lens_data(step, step.lens),
        lens.changes_data(step, step.lens),
        lens.curve_rows(step, step.lens),
        lens.layer_rows(step.lens),
    ):
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return True


def test_numpy_numbers_and_lone_surrogates_can_be_sent(rng: np.random.Generator) -> None:
    step = builders.step(0, rng, token="\ud800", with_lens=True)
    assert sendable(step, builders.summary(0, "\ud800"))


def test_numbers_that_are_not_known_can_be_sent(rng: np.random.Generator) -> None:
    nan = float("nan")
    step = sample_stores.without_numbers(builders.step(0, rng, with_lens=True))
    assert sendable(step, builders.summary(0, prob=nan, logprob=nan, entropy=nan, margin=nan))


def test_a_token_of_unknown_surprisal_leaves_the_others_theirs() -> None:
    nan = float("nan")
    steps = [
        builders.summary(0, logprob=nan),
        builders.summary(1, logprob=-2.0),
        builders.summary(2, logprob=-1.0),
    ]
    assert replies.shades(steps, "surprisal", LAYERS) == ([None, 1.0, 0.5], "0", "2.0 nats")
    assert replies.most_surprising_step(steps) == 1


def test_badges_tell_what_was_checked_and_what_was_drafted() -> None:
    report = builders.report()
    message = replied(capture=report)
    checked, drafted, attention = replies.trust_badges(message)
    assert checked.name == "lens check 2e-06" and "at the last layer" in checked.meaning
    assert drafted.name == "lens draft 2e-05" and "bfloat16" in drafted.meaning
    assert attention.name == "attention check 1e-06"
    whole = replies.trust_badges(replied(capture=replace(report, lens_draft=None)))
    assert [badge.name for badge in whole] == [checked.name, attention.name]
    assert replies.check_warning(message) is None


def test_badges_tell_the_largest_error_of_load_and_reply() -> None:
    here = ReplyChecks((0, 1), lens=3e-5, draft=4e-4)
    checked, drafted, _ = replies.trust_badges(replied(capture=builders.report(), checks=here))
    assert (checked.name, drafted.name) == ("lens check 3e-05", "lens draft 4e-04")


def test_a_reply_whose_check_failed_says_so_first() -> None:
    fault = "the lens of step 4 is not kept: its last layer differs"
    message = replied(capture=builders.report(), checks=ReplyChecks((0, 4), fault=fault))
    first = replies.trust_badges(message)[0]
    assert (first.name, first.colour) == ("check failed", "red")
    assert first.meaning.startswith("The lens of step 4 is not kept")
    assert "do not rely on the lens" in str(replies.check_warning(message))


def replied(**values: Any) -> Message:
    return Message(
        id=2,
        conversation_id=1,
        position=1,
        role=Role.ASSISTANT,
        content="",
        status=Status.COMPLETE,
        created_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        **values,
    )


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("end of turn", "complete · 5 tokens · 3 kB"),
        ("token limit", "cut at the token limit · 5 tokens · 3 kB"),
        ("context full", "cut: the context is full · 5 tokens · 3 kB"),
        (None, "complete · 5 tokens · 3 kB"),
    ],
)
def test_a_reply_that_the_model_did_not_end_says_so(reason: str | None, shown: str) -> None:
    assert replies.status_line(replied(reason=reason), 5, "3 kB") == shown


# ------------------------------------------------------------------------ parts


def test_thinking_is_folded_and_stays_its_steps() -> None:
    steps = [
        builders.summary(i, token) for i, token in enumerate(("<think>", "Hm", "</think>", "Paris"))
    ]
    parts = (Part("thinking", "Hm", 0, 3), Part("answer", "Paris", 3, 4))
    data = reply(steps, parts=parts)
    assert [token.get("part") for token in data["tokens"]] == ["thinking"] * 3 + [None]
    assert (data["thinking"], data["fold"]) == ("Thinking · 3 tokens", True)
    assert replies.most_surprising_step(steps, parts) == 3
    alone = reply(steps[:2], parts=(Part("thinking", "Hm", 0, 2),))
    assert alone["fold"] is False
    assert reply(steps)["thinking"] == ""


def test_special_tokens_that_were_typed_are_marked() -> None:
    prompt = Prompt(
        "", (1, 2, 3, 4, 1), ("<|end|>", "a ", "<|end|>", "<b>", "<|end|>"), ("template",) * 5
    )
    typed = replace(prompt, segments=("template", "user", "user", "template", "template"))
    assert replies.bubble_data("a <|end|><b>", "", typed)["pieces"] == [
        {"text": "a ", "mark": False},
        {"text": "<|end|>", "mark": True},
        {"text": "<b>", "mark": False},
    ]
    assert replies.bubble_data("a <|end|>", "", prompt)["pieces"] == [
        {"text": "a <|end|>", "mark": False}
    ]
