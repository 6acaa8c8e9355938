"""Texts that the model was given, on the pages: clickable tokens, and the panel of each."""

from __future__ import annotations

import base64
import datetime as dt
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import data
from dashboard.viewdata import attention, prompts
from dashboard.views import reply_map
from oki_trace.likelihood import score_of
from oki_trace.message_spans import message_spans
from oki_trace.records import Message, Prompt, Role, Status
from oki_trace.sanitize import visible
from oki_trace.store.writing.writer import TraceWriter
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


def test_the_prompt_of_a_live_reply_is_shown_as_soon_as_it_is_traced(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    with TraceWriter(tmp_path / "store.db") as writer:
        conversation, asked, reply = given_store.live(writer)
        open_store(str(tmp_path / "store.db"))
        app = app_pages.chat(conversation=conversation)
        assert not app.exception
        assert words(app, f"given-{asked}") == list(given_store.ASKED)
        drawn = app_pages.shown(app, f"given-{asked}")
        assert all(token["value"] is not None for token in drawn["tokens"])
        assert app_pages.shown(app, f"reply-{reply}")["live"]


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
    assert facts["where"] == f"position {facts['position']} of 5 in the text"


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


def numbers(app: AppTest) -> list[int]:
    """The columns of the map."""
    return [step["index"] for step in app_pages.shown(app, "reply-map")["steps"]]


@pytest.mark.parametrize("kind", reply_map.KINDS)
def test_the_map_extends_into_the_prompt(given: given_store.GivenStore, kind: str) -> None:
    conversation, second = given.second
    app = app_pages.wide_map(conversation=conversation, message=second)
    app.button_group(key="map_kind").set_value(kind).run()
    assert numbers(app) == [0, 1]
    drawn = app_pages.shown(app, "reply-map")
    assert (drawn["prompt"], drawn["reply"]) == (False, None)
    app.toggle(key="map_prompt").set_value(True).run()
    assert not app.exception
    # Also the tokens of the first turn, its reply's among them.
    assert numbers(app) == list(range(1 - 14, 2))
    drawn = app_pages.shown(app, "reply-map")
    assert (drawn["prompt"], drawn["reply"]) == (True, 13)
    assert drawn["steps"][4]["text"] == visible(given_store.HOSTILE)[:40]
    assert drawn["steps"][4]["where"] == "position 5"
    assert "line marks the start of the reply" in captions(app)


def test_the_cells_of_a_prompt_are_those_of_its_steps(given: given_store.GivenStore) -> None:
    conversation, first = given.first
    app = app_pages.wide_map(conversation=conversation, message=first)
    app.toggle(key="map_prompt").set_value(True).run()
    drawn = app_pages.shown(app, "reply-map")
    top = np.frombuffer(base64.b64decode(drawn["top"]), "<u4").reshape(-1, drawn["layers"])
    reader = data.store()
    steps = [*reader.iter_steps(first, 1, 8, given=True), *reader.iter_steps(first)]
    assert len(top) == len(steps) == 9
    for row, step in zip(top, steps, strict=True):
        assert step.lens is not None
        assert [drawn["words"][n] for n in row] == [visible(t[0])[:40] for t in step.lens.tokens]


def test_the_attention_of_a_head_in_the_prompt(given: given_store.GivenStore) -> None:
    conversation, first = given.first
    app = app_pages.wide_map(conversation=conversation, message=first, position=5)
    app.button_group(key="map_kind").set_value("attention").run()
    app.toggle(key="map_prompt").set_value(True).run()
    app.selectbox(key="map_head").set_value("head 1").run()
    assert not app.exception
    drawn = app_pages.shown(app, "reply-map")
    columns = np.frombuffer(base64.b64decode(drawn["points"]["column"]), "<i4")
    assert set(columns.tolist()) == set(range(9))


@pytest.mark.parametrize("which", ["scored", "failed"])
def test_given_tokens_alone_have_a_map(given: given_store.GivenStore, which: str) -> None:
    conversation, message = getattr(given, which)
    app = app_pages.wide_map(conversation=conversation, message=message)
    assert not app.exception
    length = len(given_store.SCORED if which == "scored" else given_store.FIRST)
    assert numbers(app) == list(range(1 - length, 0))
    assert app_pages.shown(app, "reply-map")["reply"] is None
    assert [toggle.key for toggle in app.toggle] == []


def test_a_long_prompt_is_mapped_in_windows(
    given: given_store.GivenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_map, "WINDOW", 4)
    conversation, second = given.second
    app = app_pages.wide_map(conversation=conversation, message=second, position=2)
    app.toggle(key="map_prompt").set_value(True).run()
    assert -12 in numbers(app) and len(numbers(app)) <= 4
    (choice,) = [box for box in app.selectbox if box.label == "Steps"]
    assert "position 12 to step 2" in choice.options
    assert "positions 4 to 7 of the prompt" in choice.options
    choice.set_value((11, 15)).run()
    assert numbers(app) == [-2, -1, 0, 1]


def test_spans_that_are_not_certain_are_left_out() -> None:
    tokens = ("<u>", "Hi", "<u>", "Hi", " you")
    prompt = Prompt("", (0, 1, 2, 3, 4), tokens, ("template", "user", "template", "user", "user"))
    message = user_message(1, "gone"), user_message(2, "Hi"), user_message(3, "Hi you")
    assert message_spans(prompt, message) == {3: range(3, 5), 2: range(1, 2)}
    other = user_message(4, "changed by the template")
    assert message_spans(prompt, (*message, other)) == {}


def user_message(number: int, content: str) -> Message:
    now = dt.datetime.now(dt.UTC)
    return Message(number, 1, number, Role.USER, content, Status.COMPLETE, now)


def test_score_text_of_impossible_numbers() -> None:
    steps = [builders.summary(0, logprob=-1e300), builders.summary(1, logprob=math.nan)]
    assert "perplexity" in prompts.score_text(steps[:1], whole=True)
    assert "perplexity –" in prompts.score_text(steps, whole=True)
    assert prompts.score_text([]) == ""
