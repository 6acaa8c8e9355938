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
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

STORY = "Write a long story about a lighthouse keeper and the sea."

Browse = Callable[..., Page]


# --------------------------------------------------------------------------------- finding the way


def test_a_row_of_the_list_opens_in_chat(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(explorer.url)
    page.get_by_role("link", name="Conversations").click()
    page.get_by_role("textbox", name="Search").fill("capital of France")
    page.keyboard.press("Enter")
    table = page.get_by_test_id("data-grid-canvas")
    expect(table.locator("tr")).to_have_count(2)  # with its head
    expect(table).to_contain_text(sample_stores.QUESTIONS[0])
    # The table is drawn on a canvas: its cells cannot be clicked by name.
    page.get_by_test_id("stDataFrame").click(position={"x": 200, "y": 50})
    expect(page.locator(".root.reply:not(.given)")).to_have_count(2)
    assert browser_pages.place(page)["conversation"] == samples.first[0]
    expect(page.locator(".root.bubble").first).to_have_text(sample_stores.QUESTIONS[0])


def test_a_search_that_finds_nothing_says_so(explorer: server.Explorer, browse: Browse) -> None:
    page = browse(explorer.url + "conversations")
    page.get_by_role("textbox", name="Search").fill("no such words")
    page.keyboard.press("Enter")
    expect(page.get_by_text("No conversation matches.")).to_be_visible()


def test_recent_conversations_open_from_the_sidebar(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(explorer.url)
    page.locator(".st-key-recent").get_by_text(sample_stores.QUESTIONS[0]).first.click()
    expect(page.locator(".root.reply:not(.given)")).to_have_count(2)
    assert browser_pages.place(page) == {"conversation": samples.first[0]}
    page.get_by_role("button", name="Start a chat").click()
    expect(page.locator(".root.reply:not(.given)")).to_have_count(0)
    assert browser_pages.place(page) == {}


def test_each_reply_of_a_conversation_can_be_looked_into(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.second))
    first, second = (page.locator(".root.reply:not(.given)").nth(n) for n in (0, 1))
    with TraceReader(explorer.db) as reader:
        for element, (_, message), index in (
            (first, samples.first, 2),
            (second, samples.second, 4),
        ):
            steps = reader.steps(message)
            element.locator(".token").nth(index).click()
            browser_pages.wait_for_panel(page, reader.step(message, index), len(steps))
            assert browser_pages.place(page) == {
                "conversation": samples.first[0],
                "message": message,
                "step": index,
            }
        # What was said before is part of what the second reply saw.
        evidence = page.locator(".root.evidence").text_content() or ""
    assert sample_stores.QUESTIONS[0] in evidence
    assert sample_stores.QUESTIONS[1] in evidence


def test_the_chat_is_found_by_its_name_too(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5).replace("/?", "/chat?"))
    page.locator(".root.lens tr").first.wait_for()
    expect(page.locator(".root.facts .where")).to_contain_text("step 6 of")
    expect(page.get_by_text("Page not found")).to_have_count(0)


def test_an_address_that_leads_nowhere_does_no_harm(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    first, other = samples.first[0], samples.hostile[1]
    page = browse(explorer.url)
    for query in (
        "conversation=999999",
        "conversation=zero",
        "conversation=-1",
        "conversation=99999999999999999999",
        f"conversation={first}&message=999999&step=3",
        f"conversation={first}&step=99",
        f"conversation={first}&message={other}&step=0",
    ):
        page.goto(f"{explorer.url}?{query}")
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()
        expect(page.get_by_test_id("stException")).to_have_count(0)


@pytest.mark.parametrize("width", [1440, 800])
def test_with_the_sidebar_shut_nothing_is_covered(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples, width: int
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 0), width)
    page.locator(".root.lens tr").first.wait_for()
    page.get_by_test_id("stSidebar").hover()
    page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()
    page.get_by_test_id("stExpandSidebarButton").wait_for()
    # A click that something else would get is refused.
    page.get_by_test_id("stText").filter(has_text=sample_stores.QUESTIONS[0]).click()
    page.get_by_role("radio", name="entropy", exact=True).click()
    expect(page.locator(".root.reply:not(.given) .foot").first).to_contain_text("entropy")


def test_a_line_end_can_be_seen_and_clicked(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.without_tensors, 0))
    page.locator(".root.lens tr").first.wait_for()
    page.locator(".root.reply:not(.given) .token").nth(1).click()
    expect(page.locator(".root.facts .where")).to_contain_text("step 2 of 3")


def test_the_first_token_left_out_is_not_called_unseen(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """It is left out of the picture because it has most of the attention, not none."""
    page = browse(browser_pages.of(explorer, samples.first, 3))
    first = page.locator(".root.evidence .piece").first
    first.wait_for()
    assert re.search(r"weight 0\.[0-9]*[1-9].*left out", first.get_attribute("title") or "")
    assert not first.evaluate("node => node.style.getPropertyValue('--v')")


# ----------------------------------------------------------------------------------------- privacy


def test_nothing_leaves_the_machine(
    live: server.Explorer, browse: Browse, witness: browser_pages.Witness
) -> None:
    """On every page and through a whole reply; ``browse`` looks at what was asked for."""
    page = browse(live.url)
    browser_pages.set_most_new_tokens(page, 8)
    browser_pages.ask(page, sample_stores.QUESTIONS[0])
    browser_pages.watch_to_the_end(page)
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
    witness = browser_pages.Witness()
    context = browser.new_context()
    context.set_default_timeout(browser_pages.TIMEOUT_MS)
    witness.watch(context)
    page = context.new_page()
    page.set_content("<img src='http://evil.test/x.png'><script>console.error('no')</script>")
    until(witness.abroad, "the request", seconds=10)
    context.close()
    assert witness.abroad() == ["http://evil.test/x.png"]
    assert any(text.startswith("no") for text in witness.complaints)


# --------------------------------------------------------------------------------------- quickness


def test_a_click_shows_its_step_within_a_second(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """A loose bound, for a machine that does other things; benchmarks measure."""
    page = browse(browser_pages.of(explorer, samples.second, 0))
    page.locator(".root.lens tr").first.wait_for()
    seconds = []
    for index in (3, 1, 5, 2, 4):
        began = time.perf_counter()
        page.locator(".root.reply:not(.given)").last.locator(".token").nth(index).click()
        where = page.locator(".root.facts .where")
        expect(where).to_contain_text(re.compile(rf"^step {index + 1} of"))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.0, seconds


# -------------------------------------------------------------------------- a store that cannot be


@pytest.mark.parametrize("make", [sample_stores.strangers, sample_stores.newer])
def test_a_store_that_cannot_be_opened_is_one_sentence(
    streamlit_run: Callable[[str], server.Explorer],
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
