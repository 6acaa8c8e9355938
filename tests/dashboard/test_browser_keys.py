"""The explorer without a mouse: what the Tab key leads to, what it is called, what the keys do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

Browse = Callable[..., Page]

# What has the keys: its role, what a screen reader calls it, and whether that it has them is seen,
# by itself or by the box that Streamlit draws around it.
FOCUSED = """
() => {
  let node = document.activeElement;
  while (node?.shadowRoot?.activeElement) node = node.shadowRoot.activeElement;
  if (!node || node === document.body) return null;
  const labels = [...(node.labels ?? [])].map(label => label.innerText).join(" ");
  const by = (node.getAttribute("aria-labelledby") ?? "").split(" ")
    .map(id => document.getElementById(id)?.innerText ?? "").join(" ").trim();
  const named = node.getAttribute("aria-label") || by || labels || node.innerText || node.title;
  const outlined = one => {
    const style = getComputedStyle(one);
    return (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1.5)
      || style.boxShadow !== "none";
  };
  let seen = false;
  for (let one = node, up = 0; one && up < 4; one = one.parentElement, up += 1)
    seen ||= outlined(one);
  return [node.getAttribute("role") ?? node.tagName.toLowerCase(), named.trim(), seen];
}
"""


class Stop(NamedTuple):
    role: str
    name: str
    is_seen: bool


def focused(page: Page) -> Stop | None:
    found = page.evaluate(FOCUSED)
    return None if found is None else Stop(*found)


def tab_to(page: Page, role: str, name: str, key: str = "Tab") -> None:
    """Press ``key`` until something of this role, whose name begins so, has the keys."""
    for _ in range(90):
        page.keyboard.press(key)
        at = focused(page)
        if at is not None and at.role == role and at.name.startswith(name):
            return
    raise AssertionError(f"the Tab key does not lead to {role} {name!r}")


def walk(page: Page) -> list[Stop]:
    """All stops of the Tab key, from the page's beginning to its end."""
    found = []
    for _ in range(120):
        page.keyboard.press("Tab")
        at = focused(page)
        if at is None:
            return found
        found.append(at)
    raise AssertionError("the Tab key comes to no end")


def test_the_tab_key_leads_through_the_whole_panel(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 3))
    page.locator(".root.lens tr").first.wait_for()
    page.locator(".st-key-picture-trajectory svg.marks").wait_for()
    page.locator(".root.map canvas").wait_for()
    stops = walk(page)
    # The page itself, which the arrows scroll, and the box to write into, whose frame is coloured.
    rest = [stop for stop in stops if stop.role not in ("main", "textarea")]
    assert [stop for stop in rest if not stop.name] == []
    assert [stop for stop in rest if not stop.is_seen] == []
    for role in ("option", "gridcell", "application", "region"):
        # One stop a reply, a table, a map: within it the arrows lead on.
        assert sum(stop.role == role for stop in stops) == (2 if role == "option" else 1), role
    named = [stop.name for stop in stops]
    panel = named[named.index("Previous token (left key)") :]
    order = [
        "Previous token (left key)",
        "Next token (right key)",
        "Copy a link to this step",
        "Save numbers-step-3 as CSV",
        "Save candidates-step-3 as CSV",
        "Layer",
        "Head",
        "Leave out the first token and the chat template",
        "Save evidence-step-3 as CSV",
        "The prompt and the reply so far, shaded by attention",
        "tokens",
        "Save lens-step-3 as CSV",
        "rank",
        "Pinned tokens",
        "Save curves-step-3 as CSV",
    ]
    assert [name for name in panel if name in order] == order


def test_the_keys_do_all_that_a_click_does(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 3))
    with TraceReader(explorer.db) as reader:
        steps = [reader.step(samples.first[1], n) for n in range(6)]
        total = len(reader.steps(samples.first[1]))
    browser_pages.wait_for_panel(page, steps[3], total)

    tab_to(page, "option", steps[3].token.strip())
    page.keyboard.press("ArrowRight")
    browser_pages.wait_for_panel(page, steps[4], total)
    assert browser_pages.place(page)["step"] == 4
    page.keyboard.press("ArrowLeft")
    browser_pages.wait_for_panel(page, steps[3], total)
    tab_to(page, "button", "Next token")
    page.keyboard.press("Enter")
    browser_pages.wait_for_panel(page, steps[4], total)
    until(
        lambda: (focused(page) or Stop("", "", False)).name.startswith("Next token"),
        "the keys",
    )

    painted = page.locator(".root.evidence .text")
    before = painted.inner_html()
    tab_to(page, "combobox", "Layer")
    page.keyboard.press("ArrowDown")
    page.get_by_role("option", name="layer 29").wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    until(lambda: painted.inner_html() != before, "another layer's evidence")
    before = painted.inner_html()
    tab_to(page, "combobox", "Head")
    page.keyboard.press("ArrowDown")
    page.get_by_role("option", name="maximum of heads").wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    until(lambda: painted.inner_html() != before, "another head's evidence")
    before = painted.inner_html()
    tab_to(page, "switch", "Leave out")
    page.keyboard.press("Space")
    until(lambda: painted.inner_html() != before, "the first token's weight")

    tab_to(page, "gridcell", "layer 30, rank 1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert (focused(page) or Stop("", "", False)).name.startswith("layer 29, rank 2")
    page.keyboard.press("Enter")
    expect(page.locator(".root.lens .cell.pinned").first).to_be_visible()
    tab_to(page, "radio", "rank")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("radio", name="probability")).to_be_checked()
    assert browser_pages.place(page)["step"] == 4, "the arrows were the control's"


def test_a_conversation_is_chosen_and_opened_by_the_keys(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(explorer.url + "conversations")
    page.get_by_test_id("data-grid-canvas").wait_for()
    tab_to(page, "combobox", "Choose a conversation")
    page.keyboard.type(sample_stores.QUESTIONS[0][:20])
    page.get_by_role("option", name=sample_stores.QUESTIONS[0]).wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Rename")).to_be_visible()
    tab_to(page, "button", "open_in_new", "Shift+Tab")  # the icon's name, then the button's
    page.keyboard.press("Enter")
    expect(page.locator(".root.reply:not(.given)")).to_have_count(2)
    assert browser_pages.place(page)["conversation"] == samples.first[0]


def test_a_row_of_an_answer_is_chosen_by_the_keys(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    conversation = samples.first[0]
    page = browse(
        f"{explorer.url}questions?question=uncertainty&view=entropy&conversation={conversation}"
    )
    page.get_by_test_id("data-grid-canvas").wait_for()
    tab_to(page, "combobox", "Open a row")
    page.keyboard.press("ArrowDown")
    option = page.get_by_role("option", name="1 · ").first
    option.wait_for()
    step = int(option.inner_text().partition("step ")[2].split()[0])
    page.keyboard.press("Enter")
    page.locator(".root.reply:not(.given)").first.wait_for()
    until(lambda: browser_pages.place(page).get("step") == step, "the row's step")
    page.go_back()
    page.get_by_test_id("data-grid-canvas").wait_for()
    expect(page.get_by_role("combobox", name="Open a row")).to_have_value("")
