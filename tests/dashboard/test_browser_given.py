"""A token that the model was given, clicked in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.sanitize import visible
from tests.dashboard import browser_pages, given_store, server

pytestmark = pytest.mark.browser


# As in components/map_paint.js and map_cells.js: the column of layers, the row of tokens, a cell.
GUTTER, HEAD, WIDE = 52, 44, 56


def test_a_token_of_the_prompt_can_be_clicked(
    run_explorer: Callable[..., server.Explorer],
    browse: Callable[..., Page],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    built = given_store.build(str(tmp_path_factory.mktemp("given") / "store.db"))
    explorer = run_explorer(built.db)
    _click_a_token(explorer, browse, *built.first)
    _click_a_column(explorer, browse, *built.second)


def _click_a_token(
    explorer: server.Explorer, browse: Callable[..., Page], conversation: int, reply: int
) -> None:
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


def _click_a_column(
    explorer: server.Explorer, browse: Callable[..., Page], conversation: int, reply: int
) -> None:
    """A column of the prompt, on the map of a second turn."""
    page = browse(f"{explorer.url}map?conversation={conversation}&message={reply}&step=0")
    frame = page.locator(".root.map .frame")
    expect(frame).to_have_attribute("aria-label", re.compile(r"\. 2 steps,"))
    page.get_by_text("Show the prompt").click()
    expect(frame).to_have_attribute("aria-label", re.compile(r"\. 15 steps,"))
    # The map begins with position 1; the fifth column is position 5.
    frame.evaluate("node => node.scrollTo(0, 0)")
    frame.click(position={"x": GUTTER + 4 * WIDE + 20, "y": HEAD + 8})
    what = page.locator(".root.facts .what")
    expect(what).to_have_text(visible(given_store.HOSTILE))
    place = {"conversation": conversation, "message": reply, "position": 5}
    assert browser_pages.place(page) == place
    expect(page.locator(".root.facts .where")).to_contain_text("position 5 of 14 in the prompt")
    frame.hover(position={"x": GUTTER + 4 * WIDE + 20, "y": HEAD + 8})
    expect(page.locator(".root.map .tip .first")).to_contain_text(re.compile("layer 3, position 5"))
    page.keyboard.press("ArrowRight")
    expect(what).to_have_text("?")
    assert page.locator("img[src='x']").count() == 0
    assert browser_pages.overflow(page) == []
