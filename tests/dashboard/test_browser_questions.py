"""The Questions page and the SQL page in a real browser."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Locator, Page, expect

from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.scope import Scope
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

Browse = Callable[..., Page]


def picture(page: Page, within: str = "st-key-picture-0") -> Locator:
    found = page.locator(f".{within} svg.marks")
    found.first.wait_for()
    return found.first


def table(page: Page) -> Locator:
    found = page.get_by_test_id("data-grid-canvas").last
    found.wait_for()
    return found


def saved(page: Page, label: str) -> Path:
    # The table has a button of its own for the same, which shows when it is pointed at.
    button = page.get_by_role("button", name=label).and_(
        page.locator(":not([data-testid=stBaseButton-elementToolbar])")
    )
    with page.expect_download() as download:
        button.click()
    return Path(download.value.path())


def test_a_bar_and_a_row_lead_to_their_step(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    conversation = samples.first[0]
    link = f"{explorer.url}questions?question=uncertainty&view=entropy&conversation={conversation}"
    page = browse(link)
    with QuerySession(explorer.db) as session:
        scope = Scope(conversation=conversation)
        answer = questions.answer(session, "uncertainty", view="entropy", scope=scope)
    steps = [
        dict(zip(("conversation", "message", "step"), row[:3], strict=True)) for row in answer.rows
    ]
    bars = picture(page).locator(".mark-rect path")
    expect(bars).to_have_count(len(steps))
    bars.nth(3).hover()
    tip = page.locator("#vg-tooltip-element")
    expect(tip).to_contain_text("entropy")
    expect(tip).to_contain_text(f"{answer.column('entropy')[3]:.3f}")
    bars.nth(3).click()
    where = page.locator(".root.facts .where")
    expect(where).to_contain_text(f"step {steps[3]['step'] + 1} of")
    assert browser_pages.place(page) == steps[3]

    page.goto(link)
    picture(page)
    # The second row, below the head.
    # The head and each row are 35 pixels high; cells cannot be clicked by name.
    expect(table(page)).to_contain_text(answer.column("chosen")[1].strip())
    page.get_by_test_id("stDataFrame").click(position={"x": 60, "y": 35 + 35 + 15})
    expect(where).to_contain_text(f"step {steps[1]['step'] + 1} of")
    assert browser_pages.place(page) == steps[1]


def test_the_way_back_leads_to_the_question(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(explorer.url + "questions")
    picture(page)
    page.get_by_role("button", name="Least certain steps").click()
    expect(page.get_by_role("heading", name="Uncertainty")).to_be_visible()
    picture(page).locator(".mark-rect path").nth(1).click()
    page.locator(".root.lens tr").first.wait_for()
    page.go_back()
    expect(page.get_by_role("heading", name="Uncertainty")).to_be_visible()
    picture(page)
    until(lambda: page.evaluate("location.search") == "?question=uncertainty", "the question")


def test_what_is_chosen_is_in_the_address_and_a_link_opens_it(
    explorer: server.Explorer, browse: Browse
) -> None:
    page = browse(explorer.url + "questions")
    picture(page)
    page.get_by_role("button", name="Parts of the text").click()
    expect(page.get_by_role("heading", name="Attention")).to_be_visible()
    page.get_by_role("radio", name="by step and layer").click()
    page.get_by_label("Text", exact=True).fill("capital")
    page.get_by_label("Text", exact=True).press("Enter")
    until(lambda: "text=capital" in page.evaluate("location.search"), "the text in the address")
    address = page.evaluate("location.href")
    assert "question=attention" in address and "view=grid" in address

    other = browse(address, width=800)
    picture(other)
    expect(other.get_by_label("Text", exact=True)).to_have_value("capital")
    assert browser_pages.overflow(other) == []


def test_an_answer_is_saved_as_csv_and_its_picture_as_png_and_svg(
    explorer: server.Explorer, browse: Browse
) -> None:
    page = browse(explorer.url + "questions?question=uncertainty&view=token&least=0")
    picture(page)
    with QuerySession(explorer.db) as session:
        answer = questions.answer(session, "uncertainty", view="token", least=0.0)
    found = list(csv.reader(io.StringIO(saved(page, "Export CSV").read_text(encoding="utf-8"))))
    assert found[0] == [column.name for column in answer.columns]
    assert len(found) == len(answer.rows) + 1
    png = saved(page, "Save uncertainty-token as PNG").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    tree = ElementTree.parse(saved(page, "Save uncertainty-token as SVG"))
    texts = [node.text for node in tree.iter() if node.tag.endswith("}text")]
    assert "steps" in texts
    page.get_by_text("SQL", exact=True).last.click()
    expect(page.get_by_test_id("stCode")).to_be_visible()
    # While it opens, what is in it moves away from under a click.
    page.wait_for_function("document.getAnimations().every(one => one.playState !== 'running')")
    page.get_by_role("button", name="Edit in SQL").click()
    expect(page.get_by_role("heading", name="SQL", exact=True)).to_be_visible()
    table(page)
    expect(page.get_by_label("Query")).to_have_value(answer.sql)


def test_sql_is_run_drawn_and_saved(explorer: server.Explorer, browse: Browse) -> None:
    """Text from outside stays text: no address in it is asked for."""
    page = browse(explorer.url + "sql")
    table(page)
    editor = page.get_by_label("Query")
    bad = "http://evil.test/x.png"
    editor.fill(
        f"SELECT '{bad}' AS image, '<img src={bad}>' AS title, 1.5 AS \"a.b\" UNION ALL\n"
        f"SELECT '![x]({bad})', '{bad}', 2.5"
    )
    editor.press("Control+Enter")
    expect(page.get_by_text("2 rows in")).to_be_visible()
    page.get_by_role("radio", name="chart").click()
    bars = picture(page, "st-key-sql-chart").locator(".mark-rect path")
    expect(bars).to_have_count(2)
    bars.first.hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text(bad)
    assert page.locator("#vg-tooltip-element img").count() == 0
    rows = json.loads(saved(page, "JSON").read_text(encoding="utf-8"))
    assert rows[1] == {"image": f"![x]({bad})", "title": bad, "a.b": 2.5}
    assert saved(page, "Parquet").read_bytes().startswith(b"PAR1")
    editor.fill("SELECT nothing FROM step")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_test_id("stAlert")).to_contain_text("cannot be answered")


@pytest.mark.parametrize("width", [1440, 800])
def test_sql_fits_and_a_link_runs_it(explorer: server.Explorer, browse: Browse, width: int) -> None:
    page = browse(explorer.url + "sql?sql=" + quote("SELECT 6 * 7 AS answer"), width=width)
    page.get_by_role("button", name="Run query").click()
    expect(page.get_by_text("1 row in")).to_be_visible()
    table(page)
    expect(page.get_by_text("the token's text")).to_be_visible()
    # The handle to widen a table with reaches a little over the table's edge.
    assert [wide for wide in browser_pages.overflow(page) if not wide.startswith("column")] == []
