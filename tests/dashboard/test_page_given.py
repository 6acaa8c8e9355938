"""Texts that the model was given, on the pages: clickable tokens, and the panel of each."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import data
from dashboard.viewdata import attention, prompts
from oki_trace.likelihood import score_of
from oki_trace.records import Message, Prompt, Role, Status
from oki_trace.sanitize import visible
from tests import builders
from tests.dashboard import app_pages, given_store


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> given_store.GivenStore:
    return given_store.build(str(tmp_path_factory.mktemp("given") / "store.db"))


@pytest.fixture
def given(
    built: given_store.GivenStore, open_store: Callable[[str], None]
) -> given_store.GivenStore:
    open_store(built.db)
    return built


def captions(app: AppTest) -> str:
    return " ".join(app_pages.plainly(c.value) for c in app.caption)


def words(app: AppTest, key: str) -> list[str]:
    return [token["text"] for token in app_pages.shown(app, key)["tokens"]]


def test_messages_before_a_reply_are_tokens(given: given_store.GivenStore) -> None:
    conversation, first = given.first
    app = app_pages.chat(conversation=conversation)
    assert not app.exception
    messages = data.conversation(conversation)
    assert messages is not None
    system, asked, _, then, second = (message.id for message in messages[1])
    assert words(app, f"given-{system}") == list(given_store.SYSTEM)
    assert words(app, f"given-{asked}") == list(given_store.ASKED)
    assert words(app, f"given-{then}") == list(given_store.THEN)
    drawn = app_pages.shown(app, f"given-{asked}")
    assert (drawn["message"], drawn["first"], drawn["label"]) == (first, 4 - 8, "")
    assert all(token["value"] is not None for token in drawn["tokens"])
    assert drawn["name"] == "surprisal"
    assert app_pages.shown(app, f"given-{system}")["label"] == "system"
    later = app_pages.shown(app, f"given-{then}")
    assert (later["message"], later["first"]) == (second, 11 - 14)
    app.button_group(key="colour").set_value("entropy").run()
    assert app_pages.shown(app, f"given-{asked}")["name"] == "entropy"


def test_a_link_to_a_token_of_the_prompt_opens_its_panel(given: given_store.GivenStore) -> None:
    conversation, first = given.first
    app = app_pages.chat(conversation=conversation, message=first, position=5)
    assert not app.exception
    facts = app_pages.shown(app, "facts")
    assert (facts["step"], facts["position"], facts["first"]) == (5 - 8, 5, 1 - 8)
    assert facts["where"] == "position 5 of 8 in the prompt"
    assert facts["rows"][1][:2] == [None, 5]
    assert "Given: this token is part of the text" in captions(app)
    assert "Sampled" not in captions(app) and "Greedy" not in captions(app)
    assert len(app_pages.shown(app, "evidence")["pieces"]) == 5
    assert app_pages.shown(app, "lens")["rows"]
    for head in attention.head_options(2):
        app.selectbox(key="evidence_head").set_value(head).run()
        assert not app.exception


def test_a_token_shared_with_an_earlier_turn_has_its_step(given: given_store.GivenStore) -> None:
    conversation, second = given.second
    app = app_pages.chat(conversation=conversation, message=second, position=5)
    assert not app.exception
    facts = app_pages.shown(app, "facts")
    assert (facts["message"], facts["step"]) == (second, 5 - 14)
    assert facts["what"] == visible(given_store.HOSTILE)
    # A token of the first reply was chosen there.
    app = app_pages.chat(conversation=conversation, message=second, position=8)
    assert app_pages.shown(app, "facts")["position"] == 8
    assert "Given" not in captions(app)


def test_a_position_without_a_step_shows_the_nearest(given: given_store.GivenStore) -> None:
    conversation, first = given.first
    for position, shown in ((0, 1), (7, 7), (999, 7)):
        app = app_pages.chat(conversation=conversation, message=first, position=position)
        assert not app.exception
        assert app_pages.shown(app, "facts")["position"] == shown


def test_a_scored_text_is_its_tokens_and_its_score(given: given_store.GivenStore) -> None:
    conversation, message = given.scored
    app = app_pages.chat(conversation=conversation)
    assert not app.exception
    drawn = app_pages.shown(app, f"reply-{message}")
    assert words(app, f"reply-{message}") == list(given_store.SCORED)
    assert [token.get("untraced", False) for token in drawn["tokens"]] == [True, *[False] * 4]
    steps = data.store().steps(message, given=True)
    score = score_of(steps)
    assert drawn["status"] == (
        f"4 tokens given · logprob {score.logprob:.2f} nats · perplexity {score.perplexity:.2f} · "
        f"{score.bits_per_byte:.3f} bits per byte · tiny/model"
    )
    facts = app_pages.shown(app, "facts")
    assert facts["position"] == min(steps, key=lambda s: s.logprob).position
    assert facts["where"] == f"position {facts['position']} of 5 in the prompt"


def test_a_reply_that_failed_after_its_prompt(given: given_store.GivenStore) -> None:
    conversation, message = given.failed
    app = app_pages.chat(conversation=conversation)
    assert not app.exception
    assert app_pages.shown(app, f"reply-{message}")["bad"]
    assert app_pages.shown(app, "facts")["position"] is not None


@pytest.mark.parametrize("which", ["first", "second", "scored", "failed"])
def test_other_pages_take_given_tokens(given: given_store.GivenStore, which: str) -> None:
    conversation, message = getattr(given, which)
    for query in ({}, {"position": 3}, {"step": 0}):
        app = app_pages.wide_map(conversation=conversation, message=message, **query)
        assert not app.exception
    assert not app_pages.conversations().exception
    assert not app_pages.acting(conversation).exception
    assert not app_pages.comparing(message, given.first[1]).exception
    assert not app_pages.comparing(given.first[1], message).exception


def test_spans_that_are_not_certain_are_left_out() -> None:
    tokens = ("<u>", "Hi", "<u>", "Hi", " you")
    prompt = Prompt("", (0, 1, 2, 3, 4), tokens, ("template", "user", "template", "user", "user"))
    message = user_message(1, "gone"), user_message(2, "Hi"), user_message(3, "Hi you")
    assert prompts.message_spans(prompt, message) == {3: range(3, 5), 2: range(1, 2)}
    other = user_message(4, "changed by the template")
    assert prompts.message_spans(prompt, (*message, other)) == {}


def user_message(number: int, content: str) -> Message:
    now = dt.datetime.now(dt.UTC)
    return Message(number, 1, number, Role.USER, content, Status.COMPLETE, now)


def test_score_text_of_impossible_numbers() -> None:
    steps = [builders.summary(0, logprob=-1e300), builders.summary(1, logprob=math.nan)]
    assert "perplexity" in prompts.score_text(steps[:1], whole=True)
    assert "perplexity –" in prompts.score_text(steps, whole=True)
    assert prompts.score_text([]) == ""
