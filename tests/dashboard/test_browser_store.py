"""In a real browser: what comes in, how the store is, and two steps beside each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Page, expect

from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

Browse = Callable[..., Page]


def test_an_export_is_uploaded_and_the_store_verified(
    run_explorer: Callable[..., server.Explorer],
    browse: Browse,
    samples: sample_stores.Samples,
    tmp_path: Path,
) -> None:
    explorer = run_explorer()
    file = tmp_path / "paris.json"
    with TraceReader(samples.db) as reader, file.open("w", encoding="utf-8") as nowhere:
        steps = reader.conversation(samples.first[0]).tokens
        export(reader, samples.first[0], Format.JSON, file, nowhere, tensors=True)
    page = browse(explorer.url + "conversations")
    page.get_by_role("button", name="Import").click()
    page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(
        [file, file.with_suffix(".safetensors")]
    )
    page.locator(".st-key-import button").click()
    expect(page.get_by_test_id("stAlert")).to_contain_text(f"{steps} steps")
    # What was brought in can be looked into as if it had been said here.
    page.goto(explorer.url + "?conversation=1")
    expect(page.locator(".root.bubble").first).to_have_text(sample_stores.QUESTIONS[0])
    page.goto(explorer.url + "store")
    page.get_by_role("button", name="Verify").click()
    expect(page.get_by_test_id("stAlert")).to_contain_text("No problems found")
    expect(page.get_by_test_id("stAlert")).to_contain_text(f"{steps} steps")
    expect(page.locator(".root.amounts .row").first).to_be_visible()
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(1)


def test_a_click_in_compare_brings_its_two_steps(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    left, right = samples.first[1], samples.second[1]
    page = browse(f"{explorer.url}compare?left={left}&right={right}")
    tokens = page.locator(".root.compare .side").first.locator(".token")
    tokens.nth(2).click()
    numbers = page.locator(".st-key-compare-steps .root.table tr").nth(1).locator("td")
    expect(numbers.nth(1)).to_have_text("2")
    pair = int(tokens.nth(2).get_attribute("data-pair") or "")
    until(lambda: browser_pages.place(page).get("pair") == pair, "the pair in the address")
    expect(page.locator(".root.compare .token.chosen").first).to_have_attribute(
        "data-pair", str(pair)
    )
    # The chosen one is the Tab key's only stop; the keys lead on from it and back.
    side = page.locator(".root.compare .side").first
    expect(side.locator("[tabindex='0']")).to_have_count(1)
    tokens.nth(2).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(numbers.nth(1)).to_have_text("3")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(numbers.nth(1)).to_have_text("2")
    page.locator(".st-key-open-left button").click()
    page.wait_for_url(re.compile(r"step=2"))
    page.locator(".root.reply:not(.given) .token.chosen").wait_for()
    assert browser_pages.chosen(page) == 2
