"""The explorer in a real browser, as a user meets it: nothing is mocked.

Whatever a test does, no request may leave the machine and nothing may complain
in the browser's console: ``browse`` holds both for every page it opened.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from explorers import Explorer, eventually
from playwright.sync_api import Browser, Page, expect
from screens import (
    Witness,
    ask,
    overflow,
    panel,
    place,
    progress,
    ready_for_a_message,
    said,
    set_most_new_tokens,
    status,
    tokens,
    wait_for_panel,
    wait_for_tokens,
    watch_to_the_end,
)
from stories import (
    FAILURE,
    HOSTILE,
    LENS_REASON,
    LONG,
    NO_ATTENTION,
    QUESTIONS,
    Stories,
    newer,
    strangers,
)

from dashboard import shapes
from oki_trace.records import Role, Status
from oki_trace.store.reader import TraceReader

pytestmark = pytest.mark.browser

STORY = "Write a long story about a lighthouse keeper and the sea."

Browse = Callable[..., Page]


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def browse(browser: Browser, witness: Witness) -> Iterator[Browse]:
    """Opens an address in a window of its own."""
    with ExitStack() as contexts:

        def open_page(address: str, width: int = 1440, height: int = 1000) -> Page:
            context = browser.new_context(viewport={"width": width, "height": height})
            contexts.callback(context.close)
            context.set_default_timeout(30_000)
            witness.watch(context)
            page = context.new_page()
            page.goto(address)
            page.get_by_test_id("stAppViewContainer").wait_for()
            return page

        yield open_page
    assert witness.abroad() == []
    assert witness.complaints == []


def of(explorer: Explorer, reply: tuple[int, int], step: int | None = None) -> str:
    """The address of a reply, or of one step of it."""
    conversation, message = reply
    query = f"?conversation={conversation}&message={message}"
    return explorer.url + query + ("" if step is None else f"&step={step}")


def chosen(page: Page) -> int:
    """The index of the token that is marked as chosen."""
    index = page.locator(".root.reply .token.chosen").get_attribute("data-index")
    assert index is not None
    return int(index)


# ------------------------------------------------------------------ a new user


def test_a_new_user_asks_and_sees_why_each_token_was_chosen(
    run_explorer: Callable[..., Explorer], browse: Browse
) -> None:
    explorer = run_explorer()
    page = browse(explorer.url)
    ask(page, QUESTIONS[0])
    seen = watch_to_the_end(page)
    assert len(seen) > 1, "tokens come while the cursor is there"
    assert seen == sorted(seen)
    assert "Paris" in "".join(tokens(page))
    # However often the page asked for it while it was not yet up.
    assert len(explorer.family()[2:]) == 1, "one question starts one process"

    with TraceReader(explorer.db) as reader:
        conversation, reply = place(page)["conversation"], reader.messages(1)[-1]
        steps = reader.steps(reply.id)
        assert tokens(page) == [s.token for s in steps]
        paris = next(s.step_index for s in steps if "Paris" in s.token)

        page.locator(".root.reply .token").filter(has_text="Paris").click()
        wait_for_panel(page, reader.step(reply.id, paris), len(steps))
        assert QUESTIONS[0] in (page.locator(".root.evidence").text_content() or "")
        assert place(page) == {"conversation": conversation, "message": reply.id, "step": paris}
        assert chosen(page) == paris

        page.keyboard.press("ArrowRight")
        wait_for_panel(page, reader.step(reply.id, paris + 1), len(steps))
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        wait_for_panel(page, reader.step(reply.id, paris - 1), len(steps))
        assert place(page)["step"] == paris - 1

        again = browse(page.url)
        wait_for_panel(again, reader.step(reply.id, paris - 1), len(steps))
        assert chosen(again) == paris - 1

        page.locator(".root.reply .token").first.click()
        wait_for_panel(page, reader.step(reply.id, 0), len(steps))
        page.go_back()
        wait_for_panel(page, reader.step(reply.id, paris - 1), len(steps))


# ------------------------------------------------------------- while it answers


def test_tokens_come_one_after_another_and_stop_keeps_them(live: Explorer, browse: Browse) -> None:
    page = browse(live.url)
    page.get_by_role("button", name="Write a short story").click()
    counts = [wait_for_tokens(page, 1)]
    while len(counts) < 4:
        counts.append(wait_for_tokens(page, counts[-1] + 1))
        assert progress(page)[1], "the cursor is there while tokens come"
    page.get_by_role("button", name="Stop").click()
    eventually("the end of the reply", lambda: not progress(page)[1])
    expect(page.locator(".root.reply .foot")).to_contain_text("stopped")
    assert status(page).count("stopped") == 1, "said once"

    with TraceReader(live.db) as reader:
        reply = reader.messages(place(page)["conversation"])[-1]
        steps = reader.steps(reply.id)
    assert reply.status is Status.STOPPED
    assert counts[-1] <= len(steps) < 256
    assert said(page) == "".join(shapes.running_text(steps)) == reply.content
    ready_for_a_message(page)


def test_a_reply_outlives_reloads_and_tabs(live: Explorer, browse: Browse) -> None:
    first = browse(live.url)
    set_most_new_tokens(first, 70)
    ask(first, STORY)
    wait_for_tokens(first, 3)

    first.reload()
    before = wait_for_tokens(first, 3)
    second = first.context.new_page()
    second.goto(first.url)
    wait_for_tokens(second, before)
    assert wait_for_tokens(first, before + 1) > before
    address = first.url
    first.close()
    second.close()

    with TraceReader(live.db) as reader:
        conversation = reader.conversations(limit=1)[0]

        def whole() -> bool:
            return not reader.messages(conversation.id)[-1].status.is_live

        eventually("the reply ends with nobody looking", whole)
        reply = reader.messages(conversation.id)[-1]
        steps = reader.steps(reply.id)
    assert reply.status is Status.COMPLETE
    assert [s.step_index for s in steps] == list(range(70))
    third = browse(address)
    third.locator(".root.reply .token").nth(69).wait_for()
    assert said(third) == reply.content
    assert "complete" in status(third)


def test_a_reply_whose_process_dies_ends_as_interrupted(live: Explorer, browse: Browse) -> None:
    """And the next question finds a new process."""
    page = browse(live.url)
    ask(page, STORY)
    count = wait_for_tokens(page, 3)
    (worker,) = [p for p in live.family() if "oki_trace.worker" in _command(p)]
    worker.kill()
    eventually("the end of the reply", lambda: not progress(page)[1])
    assert "interrupted" in status(page)
    assert len(tokens(page)) >= count
    ask(page, "What is the capital of Italy?")
    expect(page.locator(".root.reply")).to_have_count(2)
    watch_to_the_end(page)
    assert "complete" in status(page)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


# --------------------------------------------------------------- finding the way


def test_a_row_of_the_list_opens_in_chat(told: Explorer, browse: Browse, stories: Stories) -> None:
    page = browse(told.url)
    page.get_by_role("link", name="Conversations").click()
    page.get_by_role("textbox", name="Search").fill("capital of France")
    page.keyboard.press("Enter")
    table = page.get_by_test_id("data-grid-canvas")
    expect(table.locator("tr")).to_have_count(2)  # with its head
    expect(table).to_contain_text(QUESTIONS[0])
    # The table is drawn on a canvas: its cells cannot be clicked by name.
    page.get_by_test_id("stDataFrame").click(position={"x": 200, "y": 50})
    expect(page.locator(".root.reply")).to_have_count(2)
    assert place(page)["conversation"] == stories.first[0]
    expect(page.locator(".root.bubble").first).to_have_text(QUESTIONS[0])


def test_a_search_that_finds_nothing_says_so(told: Explorer, browse: Browse) -> None:
    page = browse(told.url + "conversations")
    page.get_by_role("textbox", name="Search").fill("no such words")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing found.")).to_be_visible()


def test_recent_conversations_open_from_the_sidebar(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(told.url)
    page.locator(".st-key-recent").get_by_text(QUESTIONS[0]).first.click()
    expect(page.locator(".root.reply")).to_have_count(2)
    assert place(page) == {"conversation": stories.first[0]}
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".root.reply")).to_have_count(0)
    assert place(page) == {}


def test_each_reply_of_a_conversation_can_be_looked_into(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.second))
    first, second = (page.locator(".root.reply").nth(n) for n in (0, 1))
    with TraceReader(told.db) as reader:
        for element, (_, message), index in (
            (first, stories.first, 2),
            (second, stories.second, 4),
        ):
            steps = reader.steps(message)
            element.locator(".token").nth(index).click()
            wait_for_panel(page, reader.step(message, index), len(steps))
            assert place(page) == {
                "conversation": stories.first[0],
                "message": message,
                "step": index,
            }
        # What was said before is part of what the second reply saw.
        evidence = page.locator(".root.evidence").text_content() or ""
    assert QUESTIONS[0] in evidence
    assert QUESTIONS[1] in evidence


def test_the_map_shows_every_layer_and_leads_to_a_step(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.first, 0))
    grid = page.locator(".root.map .grid")
    with TraceReader(told.db) as reader:
        steps = list(reader.iter_steps(stories.first[1]))
    expect(grid.locator(".head")).to_have_text([shapes.visible(s.token) for s in steps])
    lens = steps[0].lens
    assert lens is not None
    layers = len(lens.tokens)
    expect(grid.locator(".layer").nth(layers)).to_have_text("0")
    rows = grid.locator("[data-step='3']:not(.head)")
    expected = steps[3].lens
    assert expected is not None
    expect(rows).to_have_text(
        [shapes.visible(expected.tokens[layer][0]) for layer in range(layers - 1, -1, -1)]
    )
    rows.nth(5).click()
    wait_for_panel(page, steps[3], len(steps))


def test_an_address_that_leads_nowhere_does_no_harm(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    first, other = stories.first[0], stories.hostile[1]
    page = browse(told.url)
    for query in (
        "conversation=999999",
        "conversation=zero",
        "conversation=-1",
        "conversation=99999999999999999999",
        f"conversation={first}&message=999999&step=3",
        f"conversation={first}&step=99",
        f"conversation={first}&message={other}&step=0",
    ):
        page.goto(f"{told.url}?{query}")
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()
        expect(page.get_by_test_id("stException")).to_have_count(0)


@pytest.mark.parametrize("width", [1440, 800])
def test_with_the_sidebar_shut_nothing_is_covered(
    told: Explorer, browse: Browse, stories: Stories, width: int
) -> None:
    page = browse(of(told, stories.first, 0), width)
    page.locator(".root.lens tr").first.wait_for()
    page.get_by_test_id("stSidebar").hover()
    page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()
    page.get_by_test_id("stExpandSidebarButton").wait_for()
    # A click that something else would get is refused.
    page.get_by_test_id("stText").filter(has_text=QUESTIONS[0]).click(timeout=5_000)
    page.get_by_role("radio", name="entropy").click(timeout=5_000)
    expect(page.locator(".root.reply .foot").first).to_contain_text("entropy")


def test_a_line_end_can_be_seen_and_clicked(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.without_tensors, 0))
    page.locator(".root.lens tr").first.wait_for()
    page.locator(".root.reply .token").nth(1).click(timeout=5_000)
    expect(page.locator(".root.facts .where")).to_contain_text("step 2 of 3")


def test_the_first_token_left_out_is_not_called_unseen(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    """It is left out of the picture because it has most of the attention, not none."""
    page = browse(of(told, stories.first, 3))
    first = page.locator(".root.evidence .piece").first
    first.wait_for()
    assert "weight 0.0000" not in (first.get_attribute("title") or "")
    assert not first.evaluate("node => node.style.getPropertyValue('--v')")


# --------------------------------------------------------------------- privacy


def test_nothing_leaves_the_machine(live: Explorer, browse: Browse, witness: Witness) -> None:
    """On every page and through a whole reply; ``browse`` looks at what was asked for."""
    page = browse(live.url)
    set_most_new_tokens(page, 8)
    ask(page, QUESTIONS[0])
    watch_to_the_end(page)
    page.locator(".root.map .head").first.wait_for()
    for name, mark in (
        ("Conversations", "data-grid-canvas"),
        ("Store", "stMetric"),
        ("Chat", "stChatInputTextArea"),
    ):
        page.get_by_role("link", name=name).click()
        page.get_by_test_id(mark).first.wait_for()
    assert any(address.startswith("ws://127.0.0.1:") for address in witness.addresses)


def test_the_witness_sees_what_would_leave(browser: Browser) -> None:
    witness = Witness()
    context = browser.new_context()
    witness.watch(context)
    page = context.new_page()
    page.set_content("<img src='http://evil.test/x.png'><script>console.error('no')</script>")
    eventually("the request", witness.abroad, 10)
    context.close()
    assert witness.abroad() == ["http://evil.test/x.png"]
    assert any(text.startswith("no") for text in witness.complaints)


# ---------------------------------------------------------------- hostile text


@pytest.mark.parametrize("width", [1440, 800])
def test_hostile_text_is_text(told: Explorer, browse: Browse, stories: Stories, width: int) -> None:
    page = browse(of(told, stories.hostile, 1), width)
    page.locator(".root.map .head").first.wait_for()
    page.locator(".root.lens tr").first.wait_for()
    assert tokens(page) == [*HOSTILE, " end"]
    bubbles = page.locator(".root.bubble .said").all_text_contents()
    assert bubbles == list(HOSTILE)
    assert (page.locator(".root.evidence").text_content() or "").startswith("".join(HOSTILE))
    shown = panel(page)
    assert shown["what"] == shapes.visible(HOSTILE[1])
    assert [name for name, _ in shown["considered"]][:-1] == [shapes.visible(t) for t in HOSTILE]
    assert page.get_by_test_id("stText").filter(has_text=HOSTILE[0]).count() == 1
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src^='/x'], img[src*='evil'], a[href^='javascript']").count() == 0
    assert overflow(page) == []


def test_hostile_titles_are_text_in_the_sidebar(told: Explorer, browse: Browse) -> None:
    page = browse(told.url)
    buttons = page.locator(".st-key-recent button")
    buttons.first.wait_for()
    # Joiners are not seen: they may keep Markdown from reading its own marks.
    shown = {text.replace("\u2060", "") for text in buttons.locator("p").all_text_contents()}
    for text in HOSTILE[:4]:
        assert text in shown
    assert page.evaluate("window.pwned") is None
    assert overflow(page) == []


def test_a_title_that_is_cut_off_shows_no_marks(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(told.url)
    button = page.locator(".st-key-recent button").filter(has_text="a a a").first
    button.click()
    page.locator(".root.reply").wait_for(state="detached")
    expect(button.locator("strong")).to_have_count(1)
    assert "*" not in button.inner_text()


def test_a_direction_mark_turns_no_other_token_round(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    """A token that says "from right to left" is to stay between its neighbours."""
    page = browse(of(told, stories.hostile))
    page.locator(".root.reply .token").last.wait_for()
    boxes = [box for t in page.locator(".root.reply .token").all() if (box := t.bounding_box())]
    assert len(boxes) == len(HOSTILE) + 1
    for before, after in zip(boxes[-3:], boxes[-2:], strict=False):
        same_line = before["y"] == after["y"]
        assert not same_line or before["x"] < after["x"]


def test_numbers_that_are_not_known_are_no_harm(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    """An imported trace has no logits, and a float16 model may overflow."""
    page = browse(of(told, stories.unknown, 1))
    page.locator(".root.lens tr").first.wait_for()
    assert tokens(page) == [" the", " cat", " sat"]
    assert "NaN" not in page.locator(".st-key-sides").inner_text()
    page.locator(".root.reply .token").last.click()
    expect(page.locator(".root.facts .where")).to_contain_text("step 3 of 3")


@pytest.mark.parametrize("width", [1440, 800])
def test_twenty_thousand_characters_without_a_space_fit(
    told: Explorer, browse: Browse, stories: Stories, width: int
) -> None:
    page = browse(of(told, stories.long, 0), width)
    page.locator(".root.lens tr").first.wait_for()
    assert tokens(page) == [LONG, " end"]
    assert page.locator(".root.bubble .said").text_content() == LONG
    assert overflow(page) == []
    title = page.get_by_test_id("stText").filter(has_text="WWWW").first.bounding_box()
    assert title is not None
    assert title["height"] < 200, "a long title leaves room for the conversation"
    what = page.locator(".root.facts").bounding_box()
    assert what is not None
    assert what["height"] < 500, "a long token leaves room for what was considered"


# ---------------------------------------------------------------- what is absent


def test_what_could_not_be_captured_says_why(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.bare, 0))
    page.locator(".root.bars .row").first.wait_for()
    side = page.locator(".st-key-panel")
    expect(side).to_contain_text(NO_ATTENTION)
    expect(side).to_contain_text(LENS_REASON)
    expect(page.locator(".root.lens, .root.evidence")).to_have_count(0)
    expect(page.get_by_text("Reply map")).to_have_count(0)


def test_a_reply_without_tensors_shows_the_rows_and_says_so(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.without_tensors, 0))
    page.locator(".root.lens tr").first.wait_for()
    expect(page.locator(".st-key-panel")).to_contain_text("most attended positions were kept")
    expect(page.locator(".root.evidence .piece").first).to_be_visible()
    expect(page.get_by_label("Head", exact=True)).to_have_count(0)


def test_a_failed_reply_shows_its_reason_and_its_tokens(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.failed))
    page.locator(".root.lens tr").first.wait_for()
    expect(page.locator(".root.reply .bad")).to_contain_text(FAILURE)
    assert tokens(page) == [" the", " cat", " sat"]


def test_a_reply_that_failed_before_its_first_token_shows_its_reason(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    page = browse(of(told, stories.failed_at_once))
    expect(page.locator(".root.reply .bad")).to_contain_text("There is no model no/such")
    ready_for_a_message(page)


def test_a_model_that_is_not_there_is_a_sentence_in_the_reply(
    live: Explorer, browse: Browse
) -> None:
    page = browse(live.url)
    box = page.get_by_label("Model", exact=True)
    box.fill("./no-such-folder")
    box.press("Enter")
    ask(page, "Are you there?")
    page.locator(".root.reply .bad").wait_for(timeout=90_000)
    reason = page.locator(".root.reply .bad").inner_text()
    assert "no-such-folder" in reason
    assert "Traceback" not in reason
    with TraceReader(live.db) as reader:
        reply = reader.messages(place(page)["conversation"])[-1]
    assert (reply.role, reply.status) == (Role.ASSISTANT, Status.FAILED)


# -------------------------------------------------------------------- quickness


def test_a_click_shows_its_step_within_a_second(
    told: Explorer, browse: Browse, stories: Stories
) -> None:
    """A loose bound, for a machine that does other things; benchmarks measure."""
    page = browse(of(told, stories.second, 0))
    page.locator(".root.lens tr").first.wait_for()
    seconds = []
    for index in (3, 1, 5, 2, 4):
        began = time.perf_counter()
        page.locator(".root.reply").last.locator(".token").nth(index).click()
        where = page.locator(".root.facts .where")
        expect(where).to_contain_text(re.compile(rf"^step {index + 1} of"))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.0, seconds


# ------------------------------------------------------------ a store that cannot be


@pytest.mark.parametrize("make", [strangers, newer])
def test_a_store_that_cannot_be_opened_is_one_sentence(
    streamlit_run: Callable[[str], Explorer],
    browse: Browse,
    tmp_path: Path,
    make: Callable[[Path], str],
) -> None:
    path = tmp_path / "store.db"
    sentence = make(path)
    page = browse(streamlit_run(str(path)).url)
    expect(page.get_by_test_id("stAlert")).to_contain_text(sentence)
    expect(page.get_by_test_id("stException")).to_have_count(0)
    expect(page.get_by_text("Traceback")).to_have_count(0)
