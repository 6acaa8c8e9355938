"""The Compare page with scored texts: one text under two models."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import data
from dashboard.viewdata import one_text
from oki_trace.analysis.one_text import OneText
from oki_trace.records import StepSummary
from tests.dashboard import app_pages, one_text_store
from tests.dashboard.one_text_store import OneTextStore


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> OneTextStore:
    return one_text_store.build(str(tmp_path_factory.mktemp("texts") / "store.db"))


@pytest.fixture
def texts(built: OneTextStore, open_store: Callable[[str], None]) -> OneTextStore:
    open_store(built.db)
    return built


def aligned(first: int, second: int) -> OneText:
    left, right = data.message(first), data.message(second)
    assert left is not None and right is not None
    return data.one_text(left, right)[0]


def captions(app: AppTest) -> str:
    return " ".join(app_pages.plainly(c.value) for c in app.caption)


def test_one_vocabulary_is_compared_at_every_token(texts: OneTextStore) -> None:
    app = app_pages.comparing(texts.first, texts.second)
    assert not app.exception and not app.error
    assert app_pages.plainly(app.markdown[0].value) == (
        "Aligned by token: the 6 tokens have the same ids and texts under both models."
    )
    drawn = app_pages.shown(app, "compare-replies")
    for side, message in zip(drawn["sides"], (texts.first, texts.second), strict=True):
        assert side["message"] == message
        assert [token["position"] for token in side["tokens"]] == list(range(1, 7))
        assert [token["pair"] for token in side["tokens"]] == list(range(6))
    heat = [token["heat"] for token in drawn["sides"][0]["tokens"]]
    assert drawn["chosen"] == heat.index(max(heat))
    head, *rows = drawn["rows"]
    assert len(rows) == 6 and head[-1] == "most_total_variation"
    assert "the lower bound that the kept" in captions(app)
    assert "matched by their text" not in captions(app)
    table = app_pages.shown(app, "compare-steps")
    assert [row[0] for row in table["rows"]] == ["left", "right"]
    assert app_pages.shown(app, "bars-left")["rows"] and app_pages.shown(app, "lens-right")


def test_two_vocabularies_are_compared_by_characters(texts: OneTextStore) -> None:
    app = app_pages.comparing(texts.first, texts.split, pair=1)
    assert not app.exception and not app.error
    assert app_pages.plainly(app.markdown[0].value) == (
        "Aligned by characters: the two messages split the text into different tokens, so "
        "surprisal per byte is compared."
    )
    text = aligned(texts.first, texts.split)
    pieces = [span.text.decode() for span in text.spans]
    assert pieces == [" sky", " is", one_text_store.HOSTILE + " blue\n."]
    left, right = app_pages.shown(app, "compare-replies")["sides"]
    assert [token["pair"] for token in left["tokens"]] == [0, 1, 2, 2, 2, 2]
    assert [token["pair"] for token in right["tokens"]] == [0, 0, 1, 2, 2]
    table = app_pages.shown(app, "compare-steps")
    assert [row[:3] for row in table["rows"]] == [["left", "␣is", "2"], ["right", "␣is", "4"]]
    assert "Each bar is the text between two places" in captions(app)


def test_the_totals_follow_from_the_steps(texts: OneTextStore) -> None:
    text = aligned(texts.first, texts.split)

    def surprisal(steps: tuple[StepSummary, ...], first: int) -> float:
        return sum(step.surprisal for step in steps[first:])

    sums = surprisal(text.left, 0), surprisal(text.right, 1)
    size = len("".join(one_text_store.WORDS[1:]).encode())
    rows = one_text.totals(text)["rows"]
    for row, total, tokens in zip(rows, sums, (6, 5), strict=True):
        assert row[1:] == [
            str(tokens),
            f"{-total:.2f}",
            f"{math.exp(total / tokens):.2f}",
            f"{total / math.log(2) / size:.3f}",
        ]
    bits = one_text.bits(text)
    assert sum(left for left, _ in bits) == pytest.approx(sums[0] / math.log(2))
    assert sum(right for _, right in bits) == pytest.approx(sums[1] / math.log(2))


def test_the_page_and_the_command_line_agree(texts: OneTextStore) -> None:
    from oki_trace.analysis import questions
    from oki_trace.analysis.query_session import QuerySession

    with QuerySession(texts.db) as session:
        for other in (texts.second, texts.split):
            answer = questions.answer(session, "compare", (str(texts.first), str(other)))
            text = aligned(texts.first, other)
            assert answer.about.startswith(text.why)
            pairs = one_text.bits(text)
            if text.by == "character":
                assert answer.column("bits") == pytest.approx([left for left, _ in pairs])
                assert answer.column("other_bits") == pytest.approx([right for _, right in pairs])
            else:
                distances = data.one_text(data.message(texts.first), data.message(other))[1]
                assert answer.column("tv") == tuple(d.tv for d in distances if d is not None)


def test_different_texts_are_refused_with_the_fix(texts: OneTextStore) -> None:
    app = app_pages.comparing(texts.first, texts.different)
    assert not app.exception
    (error,) = app.error
    assert "have different texts: compare a reply with its score" in app_pages.plainly(error.value)
    assert app_pages.shown(app, "settings")["rows"]


def test_scored_texts_are_offered_by_name(texts: OneTextStore) -> None:
    app = app_pages.comparing()
    assert not app.exception
    options = app.selectbox(key="compare-left").options
    assert len(options) == 4 and all(option.endswith("· scored text") for option in options)


def test_a_selected_token_leads_to_its_step_in_chat(texts: OneTextStore) -> None:
    app = app_pages.comparing(texts.first, texts.second, pair=3)
    table = app_pages.shown(app, "compare-steps")["rows"]
    chat = app_pages.chat(conversation=texts.conversation, message=texts.first, position=4)
    assert not chat.exception
    assert app_pages.shown(chat, "facts")["what"] == table[0][1]
