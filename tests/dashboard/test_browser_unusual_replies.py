"""Hostile text, and what is not there, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.records import Role, Status
from oki_trace.sanitize import visible
from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

STORY = "Write a long story about a lighthouse keeper and the sea."

Browse = Callable[..., Page]


# ------------------------------------------------------------------------------------ hostile text


@pytest.mark.parametrize("width", [1440, 800])
def test_hostile_text_is_text(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples, width: int
) -> None:
    page = browse(browser_pages.of(explorer, samples.hostile, 1), width)
    page.locator(".root.map canvas").wait_for()
    page.locator(".root.lens tr").first.wait_for()
    assert browser_pages.tokens(page) == [*sample_stores.HOSTILE, " end"]
    bubbles = page.locator(".root.bubble .message").all_text_contents()
    assert bubbles == list(sample_stores.HOSTILE)
    assert (page.locator(".root.evidence .text").text_content() or "").startswith(
        "".join(sample_stores.HOSTILE)
    )
    shown = browser_pages.panel(page)
    assert shown["what"] == visible(sample_stores.HOSTILE[1])
    assert [name for name, _ in shown["considered"]][:-1] == [
        visible(t) for t in sample_stores.HOSTILE
    ]
    assert page.get_by_test_id("stText").filter(has_text=sample_stores.HOSTILE[0]).count() == 1
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src^='/x'], img[src*='evil'], a[href^='javascript']").count() == 0
    assert browser_pages.overflow(page) == []


def test_hostile_titles_are_text_in_the_sidebar(explorer: server.Explorer, browse: Browse) -> None:
    page = browse(explorer.url)
    buttons = page.locator(".st-key-recent button")

    def shown() -> set[str]:
        # Joiners are not seen: they may keep Markdown from reading its own marks.
        texts = buttons.locator("p").all_text_contents()
        return {text.replace("\u2060", "") for text in texts}

    until(lambda: set(sample_stores.HOSTILE[:4]) <= shown(), "the titles, as text")
    assert page.evaluate("window.pwned") is None
    assert browser_pages.overflow(page) == []


def test_a_title_that_is_cut_off_shows_no_marks(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(explorer.url)
    button = page.locator(".st-key-recent button").filter(has_text="a a a").first
    button.click()
    page.locator(".root.reply:not(.given)").wait_for(state="detached")
    expect(button.locator("strong")).to_have_count(1)
    assert "*" not in button.inner_text()


def test_a_direction_mark_turns_no_other_token_round(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """A token that says "from right to left" is to stay between its neighbours."""
    page = browse(browser_pages.of(explorer, samples.hostile))
    page.locator(".root.reply:not(.given) .token").last.wait_for()
    boxes = [
        box
        for t in page.locator(".root.reply:not(.given) .token").all()
        if (box := t.bounding_box())
    ]
    assert len(boxes) == len(sample_stores.HOSTILE) + 1
    for before, after in zip(boxes[-3:], boxes[-2:], strict=False):
        same_line = before["y"] == after["y"]
        assert not same_line or before["x"] < after["x"]


def test_numbers_that_are_not_known_are_no_harm(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """An imported trace has no logits, and a float16 model may overflow."""
    page = browse(browser_pages.of(explorer, samples.unknown, 1))
    page.locator(".root.lens tr").first.wait_for()
    assert browser_pages.tokens(page) == [" the", " cat", " sat"]
    assert "NaN" not in page.locator(".st-key-sides").inner_text()
    page.locator(".root.reply:not(.given) .token").last.click()
    expect(page.locator(".root.facts .where")).to_contain_text("step 3 of 3")


@pytest.mark.parametrize("width", [1440, 800])
def test_twenty_thousand_characters_without_a_space_fit(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples, width: int
) -> None:
    page = browse(browser_pages.of(explorer, samples.long, 0), width)
    page.locator(".root.lens tr").first.wait_for()
    assert browser_pages.tokens(page) == [sample_stores.LONG, " end"]
    assert page.locator(".root.bubble .message").text_content() == sample_stores.LONG
    assert browser_pages.overflow(page) == []
    title = page.get_by_test_id("stText").filter(has_text="WWWW").first.bounding_box()
    assert title is not None
    assert title["height"] < 200, "a long title leaves room for the conversation"
    what = page.locator(".root.facts").bounding_box()
    assert what is not None
    assert what["height"] < 500, "a long token leaves room for what was considered"


# ---------------------------------------------------------------------------------- what is absent


def test_what_could_not_be_captured_says_why(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.bare, 0))
    page.locator(".root.bars .row").first.wait_for()
    side = page.locator(".st-key-panel")
    expect(side).to_contain_text(sample_stores.NO_ATTENTION)
    expect(side).to_contain_text(sample_stores.LENS_REASON)
    expect(page.locator(".root.lens, .root.evidence")).to_have_count(0)
    expect(page.locator(".st-key-map")).to_contain_text(sample_stores.LENS_REASON)
    expect(page.locator(".root.map")).to_have_count(0)


def test_a_reply_without_tensors_shows_the_rows_and_says_so(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.without_tensors, 0))
    page.locator(".root.lens tr").first.wait_for()
    expect(page.locator(".st-key-panel")).to_contain_text("most attended positions.")
    expect(page.locator(".root.evidence .piece").first).to_be_visible()
    expect(page.locator(".st-key-panel")).to_contain_text("full tensors, which were not kept")


def test_a_failed_reply_shows_its_reason_and_its_tokens(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.failed))
    page.locator(".root.lens tr").first.wait_for()
    expect(page.locator(".root.reply:not(.given) .bad")).to_contain_text(sample_stores.FAILURE)
    assert browser_pages.tokens(page) == [" the", " cat", " sat"]


def test_a_reply_that_failed_before_its_first_token_shows_its_reason(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.failed_at_once))
    expect(page.locator(".root.reply:not(.given) .bad")).to_contain_text(
        "There is no model no/such"
    )
    browser_pages.ready_for_a_message(page)


def test_a_model_that_is_not_there_is_a_sentence_in_the_reply(
    live: server.Explorer, browse: Browse
) -> None:
    page = browse(live.url)
    box = page.get_by_label("Model", exact=True)
    box.fill("./no-such-folder")
    box.press("Enter")
    browser_pages.ask(page, "Are you there?")
    page.locator(".root.reply:not(.given) .bad").wait_for()
    reason = page.locator(".root.reply:not(.given) .bad").inner_text()
    assert "no-such-folder" in reason
    assert "Traceback" not in reason
    with TraceReader(live.db) as reader:
        reply = reader.messages(browser_pages.place(page)["conversation"])[-1]
    assert (reply.role, reply.status) == (Role.ASSISTANT, Status.FAILED)
