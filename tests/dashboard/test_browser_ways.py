"""Finding the way in the explorer, in a real browser, and that nothing leaves the machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Browser, Page, expect

from oki_trace.store.reading.reader import TraceReader
from tests.dashboard.explorers import Explorer
from tests.dashboard.screens import (
    Witness,
    ask,
    of,
    place,
    set_most_new_tokens,
    wait_for_panel,
    watch_to_the_end,
)
from tests.dashboard.stories import (
    QUESTIONS,
    Stories,
    newer,
    strangers,
)
from tests.waiting import until

pytestmark = pytest.mark.browser

STORY = "Write a long story about a lighthouse keeper and the sea."

Browse = Callable[..., Page]


# --------------------------------------------------------------------------------- finding the way


def test_a_row_of_the_list_opens_in_chat(told: Explorer, browse: Browse, stories: Stories) -> None:
    page = browse(told.url)
    page.get_by_role("link", name="Conversations").click()
    page.get_by_role("textbox", name="Search").fill("capital of France")
    page.keyboard.press("Enter")
    table = page.get_by_test_id("data-grid-canvas")
    expect(table.locator("tr")).to_have_count(2)  # with its head
    expect(table).to_contain_text(QUESTIONS[0])
    # The table is drawn on a canvas: its cells cannot be clicked by name.
    page.get_by_test_id("stDataFrame").click(position={"x": 200, "y": 50})
    expect(page.locator(".root.reply")).to_have_count(2)
    assert place(page)["conversation"] == stories.first[0]
    expect(page.locator(".root.bubble").first).to_have_text(QUESTIONS[0])


def test_a_search_that_finds_nothing_says_so(told: Explorer, browse: Browse) -> None:
    page = browse(told.url + "conversations")
    page.get_by_role("textbox", name="Search").fill("no such words")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing found.")).to_be_visible()


def test_recent_conversations_open_from_the_sidebar(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(told.url)
    page.locator(".st-key-recent").get_by_text(QUESTIONS[0]).first.click()
    expect(page.locator(".root.reply")).to_have_count(2)
    assert place(page) == {"conversation": stories.first[0]}
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".root.reply")).to_have_count(0)
    assert place(page) == {}


def test_each_reply_of_a_conversation_can_be_looked_into(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.second))
    first, second = (page.locator(".root.reply").nth(n) for n in (0, 1))
    with TraceReader(told.db) as reader:
        for element, (_, message), index in (
            (first, stories.first, 2),
            (second, stories.second, 4),
        ):
            steps = reader.steps(message)
            element.locator(".token").nth(index).click()
            wait_for_panel(page, reader.step(message, index), len(steps))
            assert place(page) == {
                "conversation": stories.first[0],
                "message": message,
                "step": index,
            }
        # What was said before is part of what the second reply saw.
        evidence = page.locator(".root.evidence").text_content() or ""
    assert QUESTIONS[0] in evidence
    assert QUESTIONS[1] in evidence


def test_the_chat_is_found_by_its_name_too(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.first, 5).replace("/?", "/chat?"))
    page.locator(".root.lens tr").first.wait_for()
    expect(page.locator(".root.facts .where")).to_contain_text("step 6 of")
    expect(page.get_by_text("Page not found")).to_have_count(0)


def test_an_address_that_leads_nowhere_does_no_harm(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    first, other = stories.first[0], stories.hostile[1]
    page = browse(told.url)
    for query in (
        "conversation=999999",
        "conversation=zero",
        "conversation=-1",
        "conversation=99999999999999999999",
        f"conversation={first}&message=999999&step=3",
        f"conversation={first}&step=99",
        f"conversation={first}&message={other}&step=0",
    ):
        page.goto(f"{told.url}?{query}")
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()
        expect(page.get_by_test_id("stException")).to_have_count(0)


@pytest.mark.parametrize("width", [1440, 800])
def test_with_the_sidebar_shut_nothing_is_covered(
    told: Explorer, browse: Browse, stories: Stories, width: int
) -> None:
    page = browse(of(told, stories.first, 0), width)
    page.locator(".root.lens tr").first.wait_for()
    page.get_by_test_id("stSidebar").hover()
    page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()
    page.get_by_test_id("stExpandSidebarButton").wait_for()
    # A click that something else would get is refused.
    page.get_by_test_id("stText").filter(has_text=QUESTIONS[0]).click(timeout=5_000)
    page.get_by_role("radio", name="entropy", exact=True).click(timeout=5_000)
    expect(page.locator(".root.reply .foot").first).to_contain_text("entropy")


def test_a_line_end_can_be_seen_and_clicked(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.without_tensors, 0))
    page.locator(".root.lens tr").first.wait_for()
    page.locator(".root.reply .token").nth(1).click(timeout=5_000)
    expect(page.locator(".root.facts .where")).to_contain_text("step 2 of 3")


def test_the_first_token_left_out_is_not_called_unseen(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    """It is left out of the picture because it has most of the attention, not none."""
    page = browse(of(told, stories.first, 3))
    first = page.locator(".root.evidence .piece").first
    first.wait_for()
    assert re.search(r"weight 0\.[0-9]*[1-9].*left out", first.get_attribute("title") or "")
    assert not first.evaluate("node => node.style.getPropertyValue('--v')")


# ----------------------------------------------------------------------------------------- privacy


def test_nothing_leaves_the_machine(live: Explorer, browse: Browse, witness: Witness) -> None:
    """On every page and through a whole reply; ``browse`` looks at what was asked for."""
    page = browse(live.url)
    set_most_new_tokens(page, 8)
    ask(page, QUESTIONS[0])
    watch_to_the_end(page)
    page.locator(".root.map canvas").wait_for()
    for name, mark in (
        ("Reply map", "stCaptionContainer"),
        ("Conversations", "data-grid-canvas"),
        ("Store", "stMetric"),
        ("Chat", "stChatInputTextArea"),
    ):
        page.get_by_role("link", name=name).click()
        page.get_by_test_id(mark).first.wait_for()
    assert any(address.startswith("ws://127.0.0.1:") for address in witness.addresses)


def test_the_witness_sees_what_would_leave(browser: Browser) -> None:
    witness = Witness()
    context = browser.new_context()
    witness.watch(context)
    page = context.new_page()
    page.set_content("<img src='http://evil.test/x.png'><script>console.error('no')</script>")
    until(witness.abroad, "the request", seconds=10)
    context.close()
    assert witness.abroad() == ["http://evil.test/x.png"]
    assert any(text.startswith("no") for text in witness.complaints)


# --------------------------------------------------------------------------------------- quickness


def test_a_click_shows_its_step_within_a_second(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    """A loose bound, for a machine that does other things; benchmarks measure."""
    page = browse(of(told, stories.second, 0))
    page.locator(".root.lens tr").first.wait_for()
    seconds = []
    for index in (3, 1, 5, 2, 4):
        began = time.perf_counter()
        page.locator(".root.reply").last.locator(".token").nth(index).click()
        where = page.locator(".root.facts .where")
        expect(where).to_contain_text(re.compile(rf"^step {index + 1} of"))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.0, seconds


# -------------------------------------------------------------------------- a store that cannot be


@pytest.mark.parametrize("make", [strangers, newer])
def test_a_store_that_cannot_be_opened_is_one_sentence(
    streamlit_run: Callable[[str], Explorer],
    browse: Browse,
    tmp_path: Path,
    make: Callable[[Path], str],
) -> None:
    path = tmp_path / "store.db"
    sentence = make(path)
    page = browse(streamlit_run(str(path)).url)
    expect(page.get_by_test_id("stAlert")).to_contain_text(sentence)
    expect(page.get_by_test_id("stException")).to_have_count(0)
    expect(page.get_by_text("Traceback")).to_have_count(0)
