"""The reply map and what can be saved, in a real browser."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Locator, Page, expect

from dashboard.viewdata import attention
from oki_trace.records import Step
from oki_trace.sanitize import visible
from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

Browse = Callable[..., Page]

# As in components/map_paint.js and map_cells.js: the column of layers, the row of tokens, a cell.
GUTTER, HEAD, WIDE, HIGH = 52, 44, 56, 19


def at(column: int, row: int) -> dict[str, float]:
    return {"x": GUTTER + column * WIDE + 20, "y": HEAD + row * HIGH + 8}


def frame(page: Page) -> Locator:
    found = page.locator(".root.map .frame")
    found.wait_for()
    return found


def saved(page: Page, name: str) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile(f"^{name}.* as CSV$")).click()
    return Path(download.value.path())


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_a_reply_and_the_numbers_of_a_step_are_saved(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.second, 2))
    page.locator(".root.lens tr").first.wait_for()
    with TraceReader(explorer.db) as reader:
        steps = reader.steps(samples.second[1])
    wanted = [
        {
            "step": s.step_index,
            "position": s.position,
            "token": visible(s.token),
            "token_id": s.token_id,
            "prob": s.prob,
            "rank": s.rank,
            "surprisal_nats": -s.logprob,
            "entropy_nats": s.entropy,
            "margin": s.margin,
            "settle_layer": "" if s.settle_layer is None else s.settle_layer,
        }
        for s in steps
    ]
    found = rows(saved(page, f"Save reply-{samples.second[1]}"))
    assert len(found) == len(steps) > 5
    for one, two in zip(found, wanted, strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            # In a spreadsheet's file what looks like a formula has an apostrophe before it.
            told_by = one[name].removeprefix("'")
            assert (float(told_by) == value) if isinstance(value, float) else told_by == str(value)
    (alone,) = rows(saved(page, "Save numbers-step-2"))
    assert alone == found[2]


@pytest.mark.parametrize("address", ["", "map"])
def test_a_cell_tells_its_layer_and_leads_to_its_step(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples, address: str
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 0).replace("/?", f"/{address}?"))
    with TraceReader(explorer.db) as reader:
        steps = list(reader.iter_steps(samples.first[1]))
    lens = steps[3].lens
    assert lens is not None
    layer = len(lens.tokens) - 6
    frame(page).hover(position=at(3, 5))
    tip = page.locator(".root.map .tip")
    expect(tip).to_contain_text(f"layer {layer}, step 3: {visible(lens.tokens[layer][0])}")
    expect(tip).to_contain_text(f"rank {lens.chosen_rank[layer]:,}")
    frame(page).click(position=at(3, 5))
    until(lambda: browser_pages.place(page).get("step") == 3, "the step in the address")
    expect(page.locator(".root.facts .where")).to_contain_text("step 4 of")
    if address:
        page.get_by_role("button", name="Open in chat").click()
    browser_pages.wait_for_panel(page, steps[3], len(steps))
    assert browser_pages.chosen(page) == 3


def test_the_map_is_walked_with_the_keys(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 2))
    frame(page).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    spoken = page.locator(".root.map [aria-live]")
    expect(spoken).to_contain_text("layer 29, step 2")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".root.facts .where")).to_contain_text("step 4 of")


def test_a_map_tells_in_words_what_it_shows(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 2).replace("/?", "/map?"))
    with TraceReader(explorer.db) as reader:
        steps = reader.steps(samples.first[1])
        points = reader.attention_points(samples.first[1], 30)
    settled = sorted(s.settle_layer for s in steps if s.settle_layer is not None)
    told_of = f"Settled: {len(settled)} of {len(steps)} steps, at layers {settled[0]} to"
    assert told_of in description(page)
    page.get_by_role("radio", name="attention").click()
    until(lambda: "Most attended" in description(page), "the words on the attention map")
    with TraceReader(explorer.db) as reader:
        prompt = reader.prompt(samples.first[1])
    parked = attention.sink_positions(prompt, steps)
    sums: dict[int, float] = {}
    for at, weight in zip(points.position.tolist(), points.weight.tolist(), strict=True):
        if at not in parked:
            sums[at] = sums.get(at, 0.0) + weight
    most = max(sums, key=sums.__getitem__)
    assert f"at position {most} ({sums[most]:.2f})" in description(page).split(", ")[1]


def description(page: Page) -> str:
    """What a screen reader is told of the map besides its name."""
    name = frame(page).get_attribute("aria-describedby")
    return page.locator(f".root.map #{name}").text_content() or ""


def test_a_token_of_another_reply_brings_its_map(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 2))
    frame(page)
    page.locator(".root.reply:not(.given)").nth(1).locator(".token").nth(4).click()
    with TraceReader(explorer.db) as reader:
        count = len(reader.steps(samples.second[1]))
    label = f"{count} steps"
    until(
        lambda: label in (page.locator(".root.map .frame").get_attribute("aria-label") or ""),
        "the other map",
    )


def test_what_is_shown_can_be_saved(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5))
    frame(page)
    with TraceReader(explorer.db) as reader:
        steps = list(reader.iter_steps(samples.first[1]))
    step = steps[5]
    assert step.lens is not None
    page.locator(".root.lens tbody tr").first.wait_for()

    candidates = rows(saved(page, "Save candidates"))
    assert [row["token"] for row in candidates] == [visible(t) for t in step.topk.tokens]
    lens = rows(saved(page, "Save lens"))
    assert [int(row["layer"]) for row in lens] == list(range(len(lens) - 1, -1, -1))
    assert [int(row["chosen_rank"]) for row in lens] == step.lens.chosen_rank.tolist()[::-1]
    evidence = rows(saved(page, "Save evidence"))
    assert len(evidence) == step.position
    weights = [float(row["weight"]) for row in evidence if row["weight"]]
    assert sum(weights) == pytest.approx(1)
    most = next(row for row in evidence if row["weight"] and float(row["weight"]) == max(weights))
    words = page.locator(".root.evidence #most-attended")
    expect(words).to_contain_text(f"at position {most['position']}, {max(weights):.3f};")
    cells = rows(saved(page, "Save layers-message"))
    assert len(cells) == len(steps) * len(lens)
    assert [c["top_token"] for c in cells[: len(lens)]] == _tops(steps[0])


def _tops(step: Step) -> list[str]:
    assert step.lens is not None
    return [visible(texts[0]) for texts in step.lens.tokens]


def test_the_map_can_be_saved_as_a_picture(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """Also with hostile text in it: the picture is well-formed and has it as text."""
    page = browse(browser_pages.of(explorer, samples.hostile, 0))
    frame(page)
    buttons = page.locator(".root.map .bar")
    with page.expect_download() as png:
        buttons.get_by_role("button", name="as PNG").click()
    assert Path(png.value.path()).read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as svg:
        buttons.get_by_role("button", name="as SVG").click()
    tree = ElementTree.parse(svg.value.path())
    assert {node.tag.rpartition("}")[2] for node in tree.iter()} == {"svg", "rect", "text"}


def test_attention_is_mapped_by_layer_and_head(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5).replace("/?", "/map?"))
    page.get_by_role("radio", name="attention").click()
    label = page.locator(".root.map .frame")
    until(lambda: "positions" in (label.get_attribute("aria-label") or ""), "the attention map")
    found = rows(saved(page, "Save attention-layer-30-mean"))
    with TraceReader(explorer.db) as reader:
        points = reader.attention_points(samples.first[1], 30)
    assert [int(row["position"]) for row in found] == points.position.tolist()
    assert browser_pages.overflow(page) == []


# -------------------------------------------------------------------------- the step panel


def test_a_token_is_pinned_by_a_click_and_let_go_by_another(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5))
    cell = page.locator(".root.lens tbody tr").nth(8).locator(".cell").first
    cell.wait_for()
    label = cell.get_attribute("data-label")
    assert label
    cell.click()
    pins = page.get_by_test_id("stMultiSelect")
    expect(pins).to_contain_text(label)
    page.locator(".root.reply:not(.given) .token").nth(2).click()
    expect(page.locator(".root.facts .where")).to_contain_text("step 3 of")
    expect(pins).to_contain_text(label)


def test_the_lens_is_walked_and_pinned_with_the_keys(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5))
    grid = page.locator(".root.lens table")
    grid.wait_for()
    assert grid.get_attribute("role") == "grid"
    stops = page.locator(".root.lens td[tabindex='0']")
    expect(stops).to_have_count(1)
    page.get_by_role("button", name="Save lens").focus()
    page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    held = page.locator(".root.lens td:focus")
    expect(held).to_have_attribute("aria-label", re.compile("^layer 28, rank 2: "))
    expect(stops).to_have_count(1)
    # The keys were the grid's: the step is the same.
    expect(page.locator(".root.facts .where")).to_contain_text("step 6 of")
    label = held.get_attribute("data-label")
    assert label
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("stMultiSelect")).to_contain_text(label)
    # Drawn anew with its pin, it still has the keys.
    expect(held).to_have_attribute("aria-label", re.compile("rank 2: .*pinned"))


def test_a_chart_is_saved_as_rows_and_pictures(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5))
    page.locator(".st-key-picture-trajectory svg.marks").wait_for()
    with TraceReader(explorer.db) as reader:
        lens = reader.step(samples.first[1], 5).lens
    assert lens is not None
    found = [r for r in rows(saved(page, "Save curves-step-5")) if r["kind"] == "chosen"]
    assert [int(row["rank"]) for row in found] == lens.chosen_rank.tolist()
    for kind, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save curves-step-5 as {kind}").click()
        assert Path(download.value.path()).read_bytes().startswith(start)


def test_on_a_narrow_page_the_step_can_be_let_down(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.first, 5), width=800)
    sheet = page.locator("[data-testid=stColumn]:has(.st-key-panel)")
    page.locator(".root.lens tr").first.wait_for()
    tall = sheet.bounding_box()
    page.get_by_role("button", name="Show the token and its numbers only").click()
    low = sheet.bounding_box()
    assert tall and low and low["height"] < tall["height"] / 2
    expect(page.locator(".root.facts .where")).to_be_in_viewport()
    page.get_by_role("button", name="Show the whole step").click()
    until(lambda: (sheet.bounding_box() or low)["height"] == tall["height"], "the sheet")
    assert browser_pages.overflow(page) == []


def test_promoted_and_suppressed_tokens_are_shown(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(browser_pages.of(explorer, samples.hostile, 1))
    page.get_by_role("radio", name="changes").click()
    table = page.locator(".root.changes table")
    expect(table).to_contain_text("promoted")
    assert table.locator("td.up").count() > 0
    assert page.evaluate("window.pwned") is None
    assert browser_pages.panel(page)["what"] == visible(sample_stores.HOSTILE[1])
    assert browser_pages.overflow(page) == []
