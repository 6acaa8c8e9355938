"""Text that runs from right to left, a token that no list has, an answer without a trace."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Browser, Locator, Page, expect

from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.dashboard import server

pytestmark = pytest.mark.browser

QUESTION = "ما هي عاصمة فرنسا؟"
# In Arabic with two English words, then a line of English, then a line of Hebrew.
REPLY = (
    *("عاصمة", " فرنسا", " New", " York", " باريس", "\n"),
    *("The", " city", "\n"),
    *("עיר", " גדולה"),
)
RANK = 4_321


def build(db: Path) -> tuple[int, int]:
    """(conversation, reply); the token of the reply's step 1 ranks below its candidates."""
    rng = np.random.default_rng(4)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation(QUESTION)
        writer.add_message(conversation, ChatMessage(Role.USER, QUESTION))
        policy = CapturePolicy(tensors="none")
        reply = writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(), policy, claim=True
        )
        writer.start_reply(reply, builders.turn_start("none"))
        steps = [
            replace(builders.step(i, rng, token=word, with_lens=True), tensors=())
            for i, word in enumerate(REPLY)
        ]
        rare = replace(steps[1], rank=RANK, prob=1e-6, token_id=steps[1].token_id + 70_000)
        writer.append(reply, [steps[0], rare, *steps[2:]])
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "".join(REPLY), "end of turn", 1.0))
    return conversation, reply


def lefts(tokens: Locator) -> list[float]:
    """Where each token begins, from the left; line ends have no place."""
    rectangles = tokens.evaluate_all("nodes => nodes.map(n => n.getBoundingClientRect().left)")
    return [float(left) for left in rectangles]


def runs_as_written(tokens: Locator) -> None:
    """Arabic and Hebrew run to the left, the English between them to the right."""
    arabic, fran, new, york, paris, _, the, city, _, hebrew, large = lefts(tokens)
    assert arabic > fran > york > new > paris, "the English words are in their own order"
    assert the < city
    assert hebrew > large


def test_a_reply_runs_in_the_direction_of_its_text(
    run_explorer: Callable[..., server.Explorer], browse: Callable[..., Page], tmp_path: Path
) -> None:
    conversation, reply = build(tmp_path / "store.db")
    explorer = run_explorer(str(tmp_path / "store.db"))
    page = browse(f"{explorer.url}?conversation={conversation}&message={reply}&step=1")
    tokens = page.locator(".root.reply:not(.given) .token")
    expect(tokens).to_have_count(len(REPLY))
    runs_as_written(tokens)
    last = page.locator(".root.bars .row").last
    expect(last).to_contain_text(f"#{RANK:,}")
    expect(last).to_have_class("row beyond chosen")
    if folder := os.environ.get("OKI_TRACE_SHOTS"):
        page.screenshot(path=f"{folder}/direction.png")


def test_an_answer_without_a_trace_is_its_text(
    run_explorer: Callable[..., server.Explorer], browse: Callable[..., Page], tmp_path: Path
) -> None:
    with TraceWriter(tmp_path / "store.db") as writer:
        conversation = writer.create_conversation("Given")
        writer.add_message(conversation, ChatMessage(Role.USER, QUESTION))
        writer.add_message(conversation, ChatMessage(Role.ASSISTANT, "باريس"))
        writer.add_message(conversation, ChatMessage(Role.USER, "Really?"))
    explorer = run_explorer(str(tmp_path / "store.db"))
    page = browse(f"{explorer.url}?conversation={conversation}")
    said = page.locator(".root.bubble .message")
    expect(said).to_have_text([QUESTION, "assistantباريس", "Really?"])
    expect(page.get_by_text("complete")).to_have_count(0)


def test_the_report_does_too(browser: Browser, tmp_path: Path) -> None:
    conversation, _ = build(tmp_path / "store.db")
    with TraceReader(tmp_path / "store.db") as reader:
        export(reader, conversation, Format.HTML, tmp_path / "report.html", sys.stdout)
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    tokens = page.locator(".reply .token")
    expect(tokens).to_have_count(len(REPLY))
    runs_as_written(tokens)
    tokens.nth(1).click()
    expect(page.locator(".bars .bar").last).to_contain_text(f"#{RANK:,}")
    page.close()
