"""The sentences that say why a token was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oki_trace.explain import effects_table, explain, explain_generation
from oki_trace.records import Contender, Effect, Step
from tests import builders

ROME = Contender(9, " Rome", 0.07, 2.9)


def step(**changes: Any) -> Step:
    """A step that drew ' Rome' where greedy decoding would have said ' the'."""
    made = builders.step(0, np.random.default_rng(0), token=" Rome", with_tensors=False)
    made = replace(made, token_id=9, prob=0.05, rank=2, sampled_prob=0.07)
    assert made.decision is not None
    decision = replace(
        made.decision,
        candidates=1234,
        noise=2.9,
        greedy=Contender(3, " the", 0.61, -0.4),
        runner_up=Contender(4, " a", 0.03, 3.1),
    )
    own = {name: value for name, value in changes.items() if name in Step.__dataclass_fields__}
    rest = {name: value for name, value in changes.items() if name not in own}
    return replace(made, decision=replace(decision, **rest), **own)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "Sampled with probability 0.07 from 1,234 tokens; noise +2.90 raised it above “ the” "
            "(0.610, noise -0.40). Greedy decoding would have chosen “ the”.",
        ),
        (
            {"greedy": ROME},
            "Sampled with probability 0.07 from 1,234 tokens; noise +2.90 kept it above “ a” "
            "(0.03, noise +3.10). Greedy decoding would have chosen the same token.",
        ),
        (
            {"greedy": ROME, "runner_up": Contender(4, " a", 0.09, 0.5)},
            "Sampled with probability 0.07 from 1,234 tokens; noise +2.90 raised it above “ a” "
            "(0.09, noise +0.50). Greedy decoding would have chosen the same token.",
        ),
        (
            {"greedy": Contender(3, " the", 0.0, -0.4)},
            "Sampled with probability 0.07 from 1,234 tokens; noise +2.90 kept it above “ a” "
            "(0.03, noise +3.10). Greedy decoding would have chosen “ the”, which the settings "
            "removed.",
        ),
        (
            {"noise": None, "greedy": Contender(3, " the", 0.61, None), "runner_up": None},
            "Sampled with probability 0.07 from 1,234 tokens. Greedy decoding would have chosen "
            "“ the”.",
        ),
        (
            {"candidates": 1},
            "The settings removed every other token.",
        ),
        (
            {"drawn": False, "rank": 1},
            "Greedy: the model's most likely token, before and after the settings.",
        ),
        (
            {"drawn": False, "sampled_prob": 0.4, "noise": None},
            "Greedy, after the settings: they changed its probability from 0.05 (rank 2) to 0.400, "
            "above the model's most likely token, “{first}”.",
        ),
    ],
    ids=[
        *("drawn", "as greedy", "as greedy, luckily", "greedy's removed", "a hidden draw"),
        *("alone", "settings for nothing", "penalised"),
    ],
)
def test_why_this_token(changes: dict[str, Any], sentence: str) -> None:
    made = step(**changes)
    assert explain(made) == sentence.format(first=made.topk.tokens[0])


def test_without_a_decision() -> None:
    plain = replace(step(), decision=None, rank=1)
    assert explain(plain) == "Greedy: the model's most likely token."
    assert explain(replace(plain, rank=3)) == "The trace does not record how this token was chosen."
    forced = "Forced: you chose this token. The probabilities are the model's own."
    assert explain(replace(plain, rank=3, origin="forced")) == forced
    assert effects_table(plain) == []


def test_tokens_are_shown_as_the_caller_shows_them() -> None:
    said = explain(step(), lambda text: f"<{text.strip()}>")
    assert said.endswith(
        "above <the> (0.610, noise -0.40). Greedy decoding would have chosen <the>."
    )


def test_the_table_has_the_model_itself_and_what_did_something() -> None:
    effects = (
        Effect("repetition penalty", "1.1", 0, 0.0, 0.05),
        Effect("temperature", "0.8", 0, 0.0, 0.04),
        Effect("forced last token", "2", 0, 0.0, 0.04),
        Effect("top-k", "50", 49_102, 0.0312, 0.0413),
        Effect("renormalized", "", 0, 0.0, 0.0413),
        Effect("min-p", "0.2", 3, 0.00012345, 0.0413),
    )
    assert effects_table(step(effects=effects)) == [
        ("the model itself", "", "", "0.05"),
        ("temperature 0.8", "", "", "0.04"),
        ("top-k 50", "49,102", "0.0312", "0.0413"),
        ("min-p 0.2", "3", "0.000123", "0.0413"),
    ]


def test_what_was_replaced() -> None:
    generation = builders.generation()
    assert explain_generation(generation) == ""
    beams = replace(generation, replaced=("beam search", "token healing"))
    assert explain_generation(beams) == "sampled in place of beam search, token healing"
    greedy = replace(beams, do_sample=False, replaced=("beam search",))
    assert explain_generation(greedy) == "greedy in place of beam search"


def test_a_given_token_was_not_chosen() -> None:
    given = replace(step(), origin="given", step_index=-1, decision=None, sampled_prob=None)
    for rank in (1, 5):
        text = explain(replace(given, rank=rank))
        assert text == "Given: part of the text that the model read, not chosen by it."
