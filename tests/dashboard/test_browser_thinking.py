"""A model that thinks and calls a tool, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.llm.chat.prompt import render
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    TemplateOptions,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from oki_trace.tracing import prepare, trace_turn
from tests import scripted
from tests.dashboard import browser_pages, server
from tests.llm.test_parts import THINK, WEATHER, tokenizer
from tests.waiting import until

pytestmark = pytest.mark.browser

ASKED = ChatMessage(Role.USER, "Rome? <|im_end|>")
REPLY = (
    "<think>\nI look it up.\n</think>\n\nOne moment.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


@pytest.fixture
def thinking(tmp_path: Path) -> tuple[str, tuple[int, int]]:
    """A store, and in it a reply that thinks, says a word, and calls a tool."""
    made = tokenizer(THINK, "<|im_end|>")
    options = TemplateOptions({}, (WEATHER,))
    folder = scripted.save(
        tmp_path / "model", made, {len(render(made, [ASKED], options=options)): REPLY}
    )
    model = scripted.model(made, {len(render(made, [ASKED], options=options)): REPLY})
    db, policy = str(tmp_path / "s.db"), CapturePolicy(tensors="none")
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Rome")
        writer.add_message(conversation, ASKED)
        reply = writer.queue_reply(
            conversation, ModelChoice(str(folder)), Sampling(), policy, claim=True, template=options
        )
        sinks = [Recorder(writer, reply)]
        trace_turn(
            prepare(model, made, sinks),
            str(folder),
            [ASKED],
            Sampling(),
            policy,
            sinks,
            template=options,
        )
    return db, (conversation, reply)


@pytest.mark.parametrize("width", [1440, 390])
def test_thinking_is_folded_and_a_tool_is_answered(
    run_explorer: Callable[..., server.Explorer],
    browse: Callable[..., Page],
    thinking: tuple[str, tuple[int, int]],
    width: int,
) -> None:
    db, kept = thinking
    explorer = run_explorer(db)
    page = browse(browser_pages.of(explorer, kept), width)
    reply = page.locator(".root.reply:not(.given)").first
    fold = reply.locator(".fold")
    expect(fold).to_contain_text("Thinking")
    hidden, answer = reply.locator(".token.thinking").first, reply.get_by_text("O", exact=True)
    expect(hidden).to_be_hidden()
    expect(answer.first).to_be_visible()
    expect(page.locator(".root.bubble .mark")).to_have_text("<|im_end|>")
    fold.click()
    expect(hidden).to_be_visible()
    hidden.click()
    until(lambda: browser_pages.panel(page)["what"] == "<", "the step of the thinking token")
    # On a narrow screen the sidebar is folded away, and narrower than what is in it.
    assert [wide for wide in browser_pages.overflow(page) if not wide.startswith("sidebar")] == []
    page.get_by_label("Tool result").fill("18 degrees")
    page.get_by_role("button", name="Send result").click()

    def answered() -> bool:
        with TraceReader(db) as reader:
            said = [m for m in reader.messages(kept[0]) if m.role is Role.TOOL]
        return [(m.content, m.tool_name) for m in said] == [("18 degrees", "get_weather")]

    until(answered, "the tool's answer in the store")
    expect(page.locator(".root.bubble .role")).to_have_text("tool get_weather")
