"""A token that the model was given, clicked in a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.sanitize import visible
from tests.dashboard import browser_pages, given_store, server

pytestmark = pytest.mark.browser


def test_a_token_of_the_prompt_can_be_clicked(
    run_explorer: Callable[..., server.Explorer],
    browse: Callable[..., Page],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    built = given_store.build(str(tmp_path_factory.mktemp("given") / "store.db"))
    explorer = run_explorer(built.db)
    conversation, reply = built.first
    page = browse(f"{explorer.url}?conversation={conversation}&message={reply}&step=0")
    what = page.locator(".root.facts .what")
    expect(what).to_have_text(visible(given_store.REPLY[0]))

    asked = page.locator(".root.reply.given").nth(1)
    assert asked.locator(".token").all_text_contents() == list(given_store.ASKED)
    asked.locator(".token").nth(1).click()
    expect(what).to_have_text(visible(given_store.HOSTILE))
    expect(page.locator(".token.chosen")).to_have_count(1)
    expect(asked.locator(".token.chosen")).to_have_text(given_store.HOSTILE)
    expect(page.get_by_text("the model did not choose it")).to_be_visible()
    place = {"conversation": conversation, "message": reply, "position": 5}
    assert browser_pages.place(page) == place

    page.keyboard.press("ArrowRight")
    expect(what).to_have_text("?")
    page.keyboard.press("ArrowRight")
    expect(what).to_have_text("<|a|>")
    page.keyboard.press("ArrowRight")
    expect(what).to_have_text(visible(given_store.REPLY[0]))
    assert browser_pages.place(page)["step"] == 0

    again = browse(f"{explorer.url}?conversation={conversation}&message={reply}&position=5")
    expect(again.locator(".root.facts .what")).to_have_text(visible(given_store.HOSTILE))
    expect(again.locator(".root.reply.given .token.chosen")).to_have_text(given_store.HOSTILE)
    assert again.locator("img[src='x']").count() == 0
    assert browser_pages.overflow(again) == []
