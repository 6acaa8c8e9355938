"""Asking and being answered, in a real browser, with the real model."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from dashboard.viewdata import replies
from oki_trace.records import Status
from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

STORY = "Write a long story about a lighthouse keeper and the sea."

Browse = Callable[..., Page]


# -------------------------------------------------------------------------------------- a new user


def test_a_new_user_asks_and_sees_why_each_token_was_chosen(
    run_explorer: Callable[..., server.Explorer], browse: Browse
) -> None:
    explorer = run_explorer()
    page = browse(explorer.url)
    browser_pages.ask(page, sample_stores.QUESTIONS[0])
    seen = browser_pages.watch_to_the_end(page)
    assert len(seen) > 1, "tokens come while the cursor is there"
    assert seen == sorted(seen)
    assert "Paris" in "".join(browser_pages.tokens(page))
    # However often the page asked for it while it was not yet up.
    assert len(explorer.family()[2:]) == 2, "one question starts one worker and its model process"

    with TraceReader(explorer.db) as reader:
        conversation, reply = browser_pages.place(page)["conversation"], reader.messages(1)[-1]
        steps = reader.steps(reply.id)
        assert browser_pages.tokens(page) == [s.token for s in steps]
        paris = next(s.step_index for s in steps if "Paris" in s.token)

        page.locator(".root.reply:not(.given) .token").filter(has_text="Paris").click()
        browser_pages.wait_for_panel(page, reader.step(reply.id, paris), len(steps))
        assert sample_stores.QUESTIONS[0] in (page.locator(".root.evidence").text_content() or "")
        assert browser_pages.place(page) == {
            "conversation": conversation,
            "message": reply.id,
            "step": paris,
        }
        assert browser_pages.chosen(page) == paris

        page.keyboard.press("ArrowRight")
        browser_pages.wait_for_panel(page, reader.step(reply.id, paris + 1), len(steps))
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        browser_pages.wait_for_panel(page, reader.step(reply.id, paris - 1), len(steps))
        assert browser_pages.place(page)["step"] == paris - 1

        again = browse(page.url)
        browser_pages.wait_for_panel(again, reader.step(reply.id, paris - 1), len(steps))
        assert browser_pages.chosen(again) == paris - 1

        page.locator(".root.reply:not(.given) .token").first.click()
        browser_pages.wait_for_panel(page, reader.step(reply.id, 0), len(steps))
        page.go_back()
        browser_pages.wait_for_panel(page, reader.step(reply.id, paris - 1), len(steps))


# -------------------------------------------------------------------------------- while it answers


def test_tokens_come_one_after_another_and_stop_keeps_them(
    live: server.Explorer, browse: Browse
) -> None:
    page = browse(live.url)
    page.get_by_role("button", name="Write a short story").click()
    counts = [browser_pages.wait_for_tokens(page, 1)]
    while len(counts) < 4:
        counts.append(browser_pages.wait_for_tokens(page, counts[-1] + 1))
        assert browser_pages.progress(page)[1], "the cursor is there while tokens come"
    page.get_by_role("button", name="Stop").click()
    until(lambda: not browser_pages.progress(page)[1], "the end of the reply")
    expect(page.locator(".root.reply:not(.given) .foot")).to_contain_text("stopped")
    assert browser_pages.status(page).count("stopped") == 1, "said once"

    with TraceReader(live.db) as reader:
        reply = reader.messages(browser_pages.place(page)["conversation"])[-1]
        steps = reader.steps(reply.id)
    assert reply.status is Status.STOPPED
    assert counts[-1] <= len(steps) < 256
    assert browser_pages.said(page) == "".join(replies.token_texts(steps)) == reply.content
    browser_pages.ready_for_a_message(page)


def test_a_reply_outlives_reloads_and_tabs(live: server.Explorer, browse: Browse) -> None:
    first = browse(live.url)
    browser_pages.set_most_new_tokens(first, 70)
    browser_pages.ask(first, STORY)
    browser_pages.wait_for_tokens(first, 3)

    first.reload()
    before = browser_pages.wait_for_tokens(first, 3)
    second = first.context.new_page()
    second.goto(first.url)
    browser_pages.wait_for_tokens(second, before)
    assert browser_pages.wait_for_tokens(first, before + 1) > before
    address = first.url
    first.close()
    second.close()

    with TraceReader(live.db) as reader:
        conversation = reader.conversations(limit=1)[0]

        def whole() -> bool:
            return not reader.messages(conversation.id)[-1].status.is_live

        until(whole, "the reply to end with nobody looking")
        reply = reader.messages(conversation.id)[-1]
        steps = reader.steps(reply.id)
    assert reply.status is Status.COMPLETE
    assert [s.step_index for s in steps] == list(range(70))
    third = browse(address)
    third.locator(".root.reply:not(.given) .token").nth(69).wait_for()
    assert browser_pages.said(third) == reply.content
    assert "cut at the token limit" in browser_pages.status(third)


def test_a_second_message_waits_its_turn(live: server.Explorer, browse: Browse) -> None:
    page = browse(live.url)
    browser_pages.set_most_new_tokens(page, 60)
    browser_pages.ask(page, STORY)
    browser_pages.wait_for_tokens(page, 2)
    browser_pages.ask(page, "What is the capital of Italy?")
    expect(page.locator(".root.reply:not(.given)")).to_have_count(2)
    expect(page.get_by_text("Queued behind 1 reply.")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_have_count(2)
    until(lambda: "complete" in browser_pages.status(page), "the second reply to be complete")
    with TraceReader(live.db) as reader:
        messages = reader.messages(browser_pages.place(page)["conversation"])
    assert [m.status for m in messages] == [Status.COMPLETE] * 4


def test_a_live_reply_is_followed_until_a_token_is_chosen(
    live: server.Explorer, browse: Browse
) -> None:
    page = browse(live.url)
    browser_pages.set_most_new_tokens(page, 300)
    browser_pages.ask(page, STORY)
    where = page.locator(".root.facts .where")

    def step() -> int:
        return int((where.text_content() or "step 0").split()[1])

    first = until(lambda: step() if where.count() else 0, "a step in the panel")
    until(lambda: step() > first, "the panel to follow")
    page.locator(".root.reply:not(.given) .token").nth(1).click()
    until(lambda: step() == 2, "the chosen step")
    before = browser_pages.progress(page)[0]
    browser_pages.wait_for_tokens(page, before + 2)
    assert step() == 2
    assert browser_pages.chosen(page) == 1
    page.get_by_role("button", name="Stop").click()
    until(lambda: not browser_pages.progress(page)[1], "the end of the reply")


def test_a_reply_whose_process_dies_ends_as_interrupted(
    live: server.Explorer, browse: Browse
) -> None:
    """And the next question finds a new process."""
    page = browse(live.url)
    browser_pages.ask(page, STORY)
    count = browser_pages.wait_for_tokens(page, 3)
    (worker,) = [p for p in live.family() if "oki_trace.worker" in _command(p)]
    worker.kill()
    until(lambda: not browser_pages.progress(page)[1], "the end of the reply")
    assert "interrupted" in browser_pages.status(page).lower()
    assert len(browser_pages.tokens(page)) >= count
    browser_pages.ask(page, "What is the capital of Italy?")
    expect(page.locator(".root.reply:not(.given)")).to_have_count(2)
    browser_pages.watch_to_the_end(page)
    assert "complete" in browser_pages.status(page)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
