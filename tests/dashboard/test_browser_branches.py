"""What if it had said the other word: branches in a real browser, with the real model."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

Browse = Callable[..., Page]


def test_a_candidate_becomes_a_branch_beside_the_reply(
    live: server.Explorer, browse: Browse
) -> None:
    page = browse(live.url)
    browser_pages.ask(page, sample_stores.QUESTIONS[0])
    browser_pages.watch_to_the_end(page)
    browser_pages.ready_for_a_message(page)
    place = browser_pages.place(page)
    with TraceReader(live.db) as reader:
        origin = reader.messages(place["conversation"])[-1]
        of = next(s for s in reader.steps(origin.id) if s.token == " France")
        step = reader.step(origin.id, of.step_index)

    page.locator(".root.reply .token").filter(has_text=" France").first.click()
    browser_pages.wait_for_panel(page, step, origin.tokens)
    other = step.topk.tokens[1]
    page.locator(".root.bars .row:not(.head)").nth(1).locator("button").click()
    expect(page.get_by_text("2 / 2")).to_be_visible()
    until(lambda: not browser_pages.progress(page)[1], "the end of the branch")
    browser_pages.ready_for_a_message(page)

    with TraceReader(live.db) as reader:
        branch = reader.messages(place["conversation"])[-1]
        steps = reader.steps(branch.id)
    assert (branch.branch_of, branch.branch_step) == (origin.id, of.step_index)
    assert steps[0].token == other and steps[0].origin == "forced"
    shown = browser_pages.tokens(page)
    assert len(shown) == of.step_index + len(steps)
    assert shown[of.step_index :] == [s.token for s in steps]
    assert page.locator(".root.reply .token.shared").count() == of.step_index

    if folder := os.environ.get("OKI_TRACE_SHOTS"):
        page.screenshot(path=f"{folder}/branch.png")
    link = page.url
    assert browser_pages.place(page)["branch"] == branch.id
    page.get_by_role("button", name="‹").click()
    expect(page.get_by_text("1 / 2")).to_be_visible()
    until(
        lambda: len(browser_pages.tokens(page)) == origin.tokens, "the reply that was there before"
    )
    again = browse(link)
    expect(again.get_by_text("2 / 2")).to_be_visible()
    until(lambda: browser_pages.tokens(again) == shown, "the same branch after a reload")

    again.get_by_role("button", name="Compare").last.click()
    sides = again.locator(".root.compare .side")
    expect(sides.nth(1).locator(".kept")).to_contain_text("The capital of")
    first = again.locator(".root.compare .token.first")
    assert [text.strip() for text in first.all_inner_texts()] == ["France", other.strip()]
    expect(again.get_by_text(f"The replies diverge at step {of.step_index}")).to_be_visible()
    assert browser_pages.overflow(again) == []
    if folder := os.environ.get("OKI_TRACE_SHOTS"):
        again.screenshot(path=f"{folder}/compare.png", full_page=True)
    again.goto(link)
    expect(again.get_by_text("2 / 2")).to_be_visible()

    # A token of the beginning opens the step of the reply that it belongs to.
    again.locator(".root.reply .token.shared").first.click()
    with TraceReader(live.db) as reader:
        first = reader.step(origin.id, 0)
    expect(again.locator(".root.facts")).to_contain_text(first.token.strip())
    until(lambda: "position" in browser_pages.place(again), "the address of a kept token")
