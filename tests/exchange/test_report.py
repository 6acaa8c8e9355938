"""The report in a real browser: one file, no request, text that stays text."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.likelihood import score_of
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
from tests import branch_store, builders
from tests.dashboard import given_store
from tests.exchange import stories
from tests.waiting import until

CHROMIUM = os.environ.get("OKI_TRACE_CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    stories.fill(folder / "s.db", steps=40)
    with TraceReader(folder / "s.db") as reader:
        export(reader, 1, Format.HTML, folder / "report.html", sys.stdout)
    return folder / "report.html"


def test_it_names_nothing_outside_itself(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert text.count("<script") == 2 and text.count("</script") == 2
    assert not re.search(r"<(link|img|iframe|object|embed|base|form)\b", text)
    # The one address is the name of SVG, which no one asks for.
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and "eval(" not in text


def test_three_hundred_steps_of_thirty_layers_are_less_than_two_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with TraceWriter(tmp_path / "s.db") as writer:
        conversation = writer.create_conversation("long")
        reply = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(tensors="none"), claim=True
        )
        writer.start_reply(reply, builders.turn_start("none", tokens=40, layers=30))
        for start in range(0, 300, 50):
            writer.append(
                reply,
                [
                    builders.step(
                        *(i, rng),
                        prompt_len=40,
                        layers=30,
                        vocab=49152,
                        topk_attention=10,
                        with_lens=True,
                        with_tensors=False,
                    )
                    for i in range(start, start + 50)
                ],
            )
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "token limit", 1.0))
    with TraceReader(tmp_path / "s.db") as reader:
        export(reader, 1, Format.HTML, tmp_path / "r.html", sys.stdout)
    # Random tokens, of which none comes twice: a real reply is smaller.
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
            pytest.fail("There is no chromium, and OKI_TRACE_REQUIRE_BROWSER is set.")
        pytest.skip("There is no chromium here.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, report: Path) -> Iterator[Any]:
    """The report, opened from the disk; nothing may be asked for and nothing may go wrong."""
    opened = chromium.new_page(viewport={"width": 1440, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("dialog", lambda dialog: wrong.append("a dialog"))
    opened.goto(report.as_uri())
    opened.wait_for_selector(".token.chosen")
    yield opened
    assert [url.partition("#")[0] for url in asked] == [report.as_uri()] * len(asked)
    assert {url.partition("#")[0] for url in asked} == {report.as_uri()}
    assert wrong == []
    opened.close()


@pytest.mark.browser
def test_hostile_text_is_text(page: Any) -> None:
    assert page.locator("h1").text_content() == f"About {stories.HOSTILE}"
    assert page.locator(".bubble.user").first.text_content() == stories.HOSTILE
    assert page.locator("script").count() == 2


@pytest.mark.browser
def test_a_click_and_the_keys_choose_a_step(page: Any) -> None:
    tokens = page.locator(".reply").first.locator(".token")
    assert tokens.count() == 41
    tokens.nth(3).click()
    assert "step 4 of 41" in page.locator(".where").text_content()
    assert page.url.endswith("#1.3")
    page.keyboard.press("ArrowRight")
    assert "step 5 of 41" in page.locator(".where").text_content()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert "step 3 of 41" in page.locator(".where").text_content()
    page.keyboard.press("End")
    assert "step 41 of 41" in page.locator(".where").text_content()
    # The odd step shows the data it has, and says which is missing.
    panel = page.locator("#panel").text_content()
    assert "Not computed for this step" in panel and "Candidates" in panel
    page.locator(".reply").nth(1).locator(".token").click()
    assert "step 1 of 1" in page.locator(".where").text_content()


@pytest.mark.browser
def test_the_step_shows_what_was_recorded(page: Any, report: Path) -> None:
    page.locator(".reply").first.locator(".fold").click()
    page.locator(".reply").first.locator(".token").nth(0).click()
    with TraceReader(report.parent / "s.db") as reader:
        step = reader.step(3, 0)
    assert step.lens is not None and step.evidence is not None
    assert page.locator(".bar:not(.head)").count() == len(step.topk.tokens)
    assert f"{step.prob:.3f}" in page.locator(".numbers").text_content()
    assert page.locator("table tr").count() == len(step.lens.tokens)
    ranks = page.locator("table td.num.dim:last-child").all_text_contents()
    assert ranks == [f"#{rank}" for rank in reversed(step.lens.chosen_rank.tolist())]
    assert "Greedy decoding would have chosen" in page.locator(".why").text_content()
    painted = page.locator(".piece").evaluate_all(
        "nodes => nodes.flatMap((n, i) => n.style.getPropertyValue('--v') ? [i] : [])"
    )
    assert set(painted) <= set(step.evidence.positions.tolist()) and painted
    page.locator("#panel select").select_option("1")
    other = page.locator(".piece").evaluate_all(
        "nodes => nodes.flatMap((n, i) => n.style.getPropertyValue('--v') ? [i] : [])"
    )
    assert set(other) <= set(step.attention[0].positions.tolist())


@pytest.mark.browser
def test_the_map_is_drawn_and_chooses(page: Any) -> None:
    page.locator(".reply").first.locator(".fold").click()
    page.locator(".reply").first.locator(".token").nth(0).click()
    page.locator("#cells").click(position={"x": 30 + 50 * 2 + 25, "y": 40})
    assert "step 3 of 41" in page.locator(".where").text_content()
    inked = page.evaluate(
        "(() => { const c = document.getElementById('cells');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0;"
        " return n / (d.length / 4); })()"
    )
    assert inked > 0.4
    assert re.fullmatch(r"steps 1 to \d\d of 41", page.locator("#range").inner_text())


@pytest.mark.browser
def test_colours_follow_the_choice(page: Any) -> None:
    def shades() -> list[str]:
        texts: list[str] = (
            page.locator(".reply")
            .first.locator(".token")
            .evaluate_all("nodes => nodes.map(n => n.style.getPropertyValue('--v'))")
        )
        return texts

    by_surprisal = shades()
    page.get_by_role("button", name="settle layer").first.click()
    assert shades() != by_surprisal
    assert page.locator(".reply.depth").count() == 2


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 800, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_spills_over(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(252, 252, 250)", "dark": "rgb(20, 23, 26)"}[scheme]


@pytest.mark.browser
def test_a_link_opens_the_same_step_and_print_holds_the_reply(page: Any, report: Path) -> None:
    page.goto(f"{report.as_uri()}#2.0")
    page.wait_for_selector(".token.chosen")
    assert "step 1 of 1" in page.locator(".where").text_content()
    page.emulate_media(media="print")
    assert page.locator(".choice").first.is_hidden()
    # The print says that a selected step is not printed.
    assert ": final layer (3)" in page.locator("#panel .paper").inner_text()
    assert len(page.pdf()) > 20_000
    # On paper, how the reply was made is part of it.
    assert page.locator("details[open]").count() == page.locator("details").count() == 2


@pytest.mark.browser
def test_on_paper_the_map_ends_with_a_whole_column(page: Any) -> None:
    page.set_viewport_size({"width": 220, "height": 900})
    page.locator(".reply").first.locator(".token").last.click()
    page.emulate_media(media="print")
    columns = "(frame.clientWidth - GUTTER) / columnWidth"
    until(lambda: abs(page.evaluate(columns) % 1 - 0.5) > 0.49, "a whole number of columns")
    steps = page.locator(".reply").first.locator(".token").count()
    assert re.fullmatch(rf"steps \d+ to {steps} of {steps}", page.locator("#range").inner_text())


@pytest.mark.browser
def test_on_a_phone_the_lens_has_two_tokens_that_can_be_read(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".reply").first.locator(".fold").click()
    page.locator(".reply").first.locator(".token").nth(0).click()
    row = page.locator("#panel table tr").first
    assert row.locator("td.cell:visible").count() == 2
    page.set_viewport_size({"width": 1440, "height": 900})
    assert row.locator("td.cell:visible").count() == 3


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a traced prompt with its second turn, and of a scored text."""
    folder = tmp_path_factory.mktemp("given")
    built = given_store.build(str(folder / "s.db"))
    with TraceReader(folder / "s.db") as reader:
        for name, conversation in (("talk", built.first[0]), ("score", built.scored[0])):
            export(reader, conversation, Format.HTML, folder / f"{name}.html", sys.stdout)
    return {name: folder / f"{name}.html" for name in ("talk", "score")} | {"db": folder / "s.db"}


def open_given(chromium: Any, report: Path, wrong: list[str]) -> Any:
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.goto(report.as_uri())
    page.wait_for_selector(".token.chosen")
    return page


@pytest.mark.browser
def test_each_version_of_a_message_shows_its_own_traced_tokens(
    chromium: Any, tmp_path: Path
) -> None:
    db = tmp_path / "s.db"
    built = given_store.build(str(db))
    with TraceWriter(db) as writer:
        edited = given_store.edit(writer, built)
    with TraceReader(db) as reader:
        export(reader, built.first[0], Format.HTML, tmp_path / "report.html", sys.stdout)
        step = reader.step(edited, 5, given=True)
    wrong: list[str] = []
    page = open_given(chromium, tmp_path / "report.html", wrong)
    shown = [
        bubble.locator(".token").all_text_contents() for bubble in page.locator(".bubble").all()
    ]
    assert shown == [
        list(said)
        for said in (given_store.SYSTEM, given_store.ASKED, given_store.THEN, given_store.EDITED)
    ]
    page.locator(".bubble.user").nth(2).locator(".token").nth(1).click()
    assert "position 5 of 8 in the prompt" in page.locator(".where").inner_text()
    assert f"{step.prob:.3f}" in page.locator(".numbers").text_content()
    assert wrong == []


@pytest.mark.browser
def test_the_tokens_of_a_traced_prompt_are_chosen_like_those_of_a_reply(
    chromium: Any, given: dict[str, Path]
) -> None:
    wrong: list[str] = []
    page = open_given(chromium, given["talk"], wrong)
    asked = page.locator(".bubble.user").nth(0)
    assert asked.locator(".token").all_text_contents() == list(given_store.ASKED)
    assert page.locator(".bubble.system .token").all_text_contents() == list(given_store.SYSTEM)
    # The second turn's own tokens, in the prompt of the second reply.
    then = page.locator(".bubble.user").nth(1)
    assert then.locator(".token").all_text_contents() == list(given_store.THEN)
    shades = asked.locator(".token").evaluate_all(
        "nodes => nodes.map(n => Number(n.style.getPropertyValue('--v')))"
    )
    assert max(shades) > 0
    assert "3 tokens given · perplexity" in asked.inner_text()
    asked.locator(".token").nth(1).click()
    assert page.url.endswith("#1.-3")
    assert "position 5 of 8 in the prompt" in page.locator(".where").inner_text()
    with TraceReader(given["db"]) as reader:
        step = reader.step(3, 5, given=True)
    assert step.lens is not None
    assert f"{step.prob:.3f}" in page.locator(".numbers").text_content()
    assert "the model did not choose it" in page.locator(".why").inner_text()
    assert page.locator(".piece").count() == 5
    ranks = page.locator("table td.num.dim:last-child").all_text_contents()
    assert ranks == [f"#{rank}" for rank in reversed(step.lens.chosen_rank.tolist())]
    assert page.locator("#map-title").inner_text().startswith("Prompt map")
    # Through the template into the reply, where the map is the reply's.
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert "step 1 of 2" in page.locator(".where").inner_text()
    assert page.locator("#map-title").inner_text().startswith("Reply map")
    page.keyboard.press("ArrowLeft")
    assert "position 7 of 8" in page.locator(".where").inner_text()
    page.keyboard.press("Home")
    assert "position 1 of 8" in page.locator(".where").inner_text()
    fourth = page.evaluate("GUTTER + 3.5 * columnWidth")
    page.locator("#cells").click(position={"x": fourth, "y": 40})
    assert page.locator(".token.chosen").text_content() == given_store.ASKED[0]
    page.goto(f"{given['talk'].as_uri()}#2.-2")
    page.reload()
    assert page.locator(".token.chosen").text_content() == given_store.THEN[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    assert wrong == []
    page.close()


@pytest.mark.browser
def test_a_scored_text_is_its_tokens_and_its_score(chromium: Any, given: dict[str, Path]) -> None:
    wrong: list[str] = []
    page = open_given(chromium, given["score"], wrong)
    with TraceReader(given["db"]) as reader:
        steps = reader.steps(6, given=True)
    words = page.locator(".reply .words")
    assert words.text_content() == "".join(given_store.SCORED)
    assert words.locator(".token").all_text_contents() == list(given_store.SCORED[1:])
    worst = min(steps, key=lambda s: s.logprob)
    assert page.locator(".token.chosen").text_content() == worst.token
    score = score_of(steps)
    assert page.locator(".status").inner_text() == (
        f"complete (scored) · 4 tokens given · logprob {score.logprob:.2f} nats · "
        f"perplexity {score.perplexity:.2f} · {score.bits_per_byte:.3f} bits per byte"
    )
    page.get_by_role("button", name="settle layer").click()
    assert page.locator(".reply.depth").count() == 1
    assert wrong == []
    page.close()


def test_a_conversation_without_traces_is_a_report_too(tmp_path: Path, chromium: Any) -> None:
    with TraceWriter(tmp_path / "s.db") as writer:
        conversation = writer.create_conversation("empty")
        writer.add_message(conversation, ChatMessage(Role.USER, "hello"))
    with TraceReader(tmp_path / "s.db") as reader:
        export(reader, 1, Format.HTML, tmp_path / "r.html", sys.stdout)
    page = chromium.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    assert "No reply of this conversation has traced tokens" in page.locator("main").inner_text()
    data = json.loads(page.locator("#data").text_content())
    assert data["replies"] == []


@pytest.mark.browser
def test_a_branch_says_where_it_departs_and_begins_with_what_it_keeps(
    tmp_path: Path, chromium: Any
) -> None:
    with TraceWriter(tmp_path / "s.db") as writer, TraceReader(tmp_path / "s.db") as reader:
        conversation, question, reply, branch = branch_store.build(writer)
        export(reader, conversation, Format.HTML, tmp_path / "r.html", sys.stdout)
        kept = "".join(reader.prompt(branch).tokens[-2:])
        own = "".join(step.token for step in reader.steps(branch))
    wrong: list[str] = []
    page = open_given(chromium, tmp_path / "r.html", wrong)
    assert page.locator(".who").all_text_contents()[-2:] == [
        f"message {branch} · branch of message {reply} from step 2",
        f"message {question + 3} · follows message {reply}",
    ]
    words = page.locator(".reply .words").nth(1)
    assert words.locator(".prefix").text_content() == kept
    assert words.locator(".token").count() == 3
    assert (words.text_content() or "").startswith(kept + own[:3])
    assert wrong == []
    page.close()
