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

    page.locator(".root.reply:not(.given) .token").filter(has_text=" France").first.click()
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
    assert page.locator(".root.reply:not(.given) .token.shared").count() == of.step_index

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
    again.locator(".root.reply:not(.given) .token.shared").first.click()
    with TraceReader(live.db) as reader:
        first = reader.step(origin.id, 0)
    expect(again.locator(".root.facts")).to_contain_text(first.token.strip())
    until(lambda: "position" in browser_pages.place(again), "the address of a kept token")


def test_the_best_candidates_are_continued_side_by_side(
    live: server.Explorer, browse: Browse
) -> None:
    page = browse(live.url)
    browser_pages.set_most_new_tokens(page, 12)
    browser_pages.ask(page, "How many legs does a spider have?")
    browser_pages.watch_to_the_end(page)
    place = browser_pages.place(page)
    with TraceReader(live.db) as reader:
        origin = reader.messages(place["conversation"])[-1]
        step = reader.step(origin.id, 0)
    page.locator(".root.reply:not(.given) .token").first.click()
    browser_pages.wait_for_panel(page, step, origin.tokens)

    # A typed text is shown as tokens before it is used.
    page.get_by_role("button", name="Other ways from here").click()
    page.get_by_label("Or your own text").fill("An octopus")
    page.get_by_label("Or your own text").press("Enter")
    expect(page.get_by_text("2 tokens: An (")).to_be_visible()
    for name, value in (("Candidates", "3"), ("Tokens each", "6")):
        number = page.get_by_test_id("stPopoverBody").get_by_role("spinbutton", name=name)
        number.fill(value)
        number.press("Enter")
    if folder := os.environ.get("OKI_TRACE_SHOTS"):
        page.screenshot(path=f"{folder}/ways-panel.png")
    page.get_by_role("button", name="Continue from each").click()

    cards = page.locator(".root.paths .card")
    expect(cards).to_have_count(4)  # three branches and the reply itself
    expect(page.locator(".root.paths .cursor")).to_have_count(0)
    with TraceReader(live.db) as reader:
        branches = [m for m in reader.messages(place["conversation"]) if m.branch_of == origin.id]
        said = {m.id: reader.steps(m.id) for m in branches}
        logprobs = reader.logprobs(place["conversation"])
    assert [len(said[m.id]) for m in branches] == [6, 6, 6]
    assert [said[m.id][0].token for m in branches] == list(step.topk.tokens[:3])
    names = page.locator(".root.paths .name").all_inner_texts()
    assert names[0] == names[1] == step.topk.tokens[0], "the likeliest, and the reply itself"
    for branch in branches:
        card = cards.filter(has=page.locator(f"[data-id='{branch.id}']"))
        expect(card).to_contain_text(f"6 tokens · {logprobs[branch.id]:.2f} nats")
        expect(card).to_contain_text("cut at the token limit")
    rows = page.locator(".root.tree li")
    expect(rows).to_have_count(2 + len(branches))
    expect(rows.last).to_contain_text(f"from {origin.id} at step 0")
    assert browser_pages.overflow(page) == []
    if folder := os.environ.get("OKI_TRACE_SHOTS"):
        page.screenshot(path=f"{folder}/ways.png", full_page=True)

    rows.last.locator("button").click()
    expect(page.get_by_text("4 / 4")).to_be_visible()
    assert browser_pages.place(page)["branch"] == branches[-1].id
    shown = [s.token for s in said[branches[-1].id]]
    until(lambda: browser_pages.tokens(page) == shown, "the branch in the chat")


def test_the_user_begins_the_answer(live: server.Explorer, browse: Browse) -> None:
    page = browse(live.url)
    browser_pages.set_most_new_tokens(page, 6)
    page.get_by_role("button", name="Begin the answer").click()
    field = page.get_by_role("textbox", name="The answer begins with")
    field.fill("Paris, because")
    field.press("Control+Enter")
    page.keyboard.press("Escape")
    browser_pages.ask(page, sample_stores.QUESTIONS[0])
    browser_pages.watch_to_the_end(page)
    assert browser_pages.tokens(page)[:3] == ["Paris", ",", " because"]
    with TraceReader(live.db) as reader:
        reply = reader.messages(browser_pages.place(page)["conversation"])[-1]
        origins = [step.origin for step in reader.steps(reply.id)]
    assert origins == ["forced"] * 3 + ["sampled"] * 6
    # The next answer begins by itself again.
    browser_pages.ready_for_a_message(page)
    page.get_by_role("button", name="Begin the answer").click()
    expect(page.get_by_role("textbox", name="The answer begins with")).to_have_value("")
    page.keyboard.press("Escape")
    assert browser_pages.overflow(page) == []
