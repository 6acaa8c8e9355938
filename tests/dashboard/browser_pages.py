"""What can be read on the explorer's pages, and what the browser did meanwhile."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import BrowserContext, Locator, Page, expect

from dashboard.viewdata.wording import format_number
from oki_trace.records import Step
from oki_trace.sanitize import visible
from tests.dashboard import server
from tests.waiting import until

Panel = dict[str, Any]

LOCAL = {"data", "blob", "about"}
# On a page below the root Streamlit asks there for its server first.
PROBES = ("/_stcore/health", "/_stcore/host-config")

# Long enough for a machine whose cores are shared: a box stays disabled while a model loads.
TIMEOUT_MS = 200_000
expect.set_options(timeout=TIMEOUT_MS)


@dataclass
class Witness:
    """Every request and every complaint of the pages in a browser context."""

    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        context.on("request", lambda request: self.addresses.append(request.url))
        context.on("page", self._follow)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("console", lambda m: self._hear(m.type, m.text, m.location["url"]))

    def _follow(self, page: Page) -> None:
        page.on("websocket", lambda socket: self.addresses.append(socket.url))

    def _hear(self, kind: str, text: str, url: str) -> None:
        if kind == "error" and not url.endswith(PROBES):
            self.complaints.append(f"{text} ({url})")

    def abroad(self) -> list[str]:
        """The addresses asked for that are not on this machine."""
        parts = [(urlsplit(address), address) for address in self.addresses]
        return [a for p, a in parts if p.scheme not in LOCAL and p.hostname != "127.0.0.1"]


def ready_for_a_message(page: Page) -> Locator:
    """The box to write into, once there is one and it is open."""
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_have_count(1)
    expect(box).to_be_enabled()
    return box


def ask(page: Page, text: str) -> None:
    box = ready_for_a_message(page)
    box.fill(text)
    box.press("Enter")
    # A page that is behind may not have taken the text in when Enter comes.
    until(lambda: box.input_value() != text or box.press("Enter"), "the message to be sent")


def set_most_new_tokens(page: Page, number: int) -> None:
    page.get_by_text("Sampling and capture").click()
    box = page.get_by_label("Maximum new tokens")
    box.fill(str(number))
    box.press("Enter")


def progress(page: Page) -> tuple[int, bool]:
    """How many tokens the last reply shows, and whether its cursor is there."""
    reply = page.locator(".root.reply:not(.given)").last
    script = "root => [root.querySelectorAll('.token').length, !!root.querySelector('.cursor')]"
    count, live = reply.evaluate(script)
    return count, live


def wait_for_tokens(page: Page, at_least: int) -> int:
    """Wait until the last reply has so many tokens; returns how many it then has."""
    page.locator(".root.reply:not(.given) .token").first.wait_for()
    return until(lambda: n if (n := progress(page)[0]) >= at_least else 0, f"{at_least} tokens")


def watch_to_the_end(page: Page) -> list[int]:
    """The numbers of tokens seen beside the cursor, until it is gone."""
    seen: list[int] = []
    page.locator(".root.reply:not(.given) .cursor").wait_for()

    def ended() -> bool:
        count, live = progress(page)
        if live and count not in seen:
            seen.append(count)
        return not live

    until(ended, "the end of the reply")
    return seen


def tokens(page: Page) -> list[str]:
    """The texts of the last reply's tokens."""
    return page.locator(".root.reply:not(.given)").last.locator(".token").all_text_contents()


def said(page: Page) -> str:
    """The last reply as text, without the mark that makes a line end something to click."""
    return "".join(tokens(page)).replace("⏎", "")


def status(page: Page) -> str:
    return page.locator(".root.reply:not(.given)").last.locator(".foot").inner_text()


def place(page: Page) -> dict[str, int]:
    """What the address says is open."""
    # Asked of the page: what Playwright knows is as old as its last call.
    query = parse_qs(page.evaluate("location.search").removeprefix("?"))
    return {name: int(values[0]) for name, values in query.items()}


def panel(page: Page) -> Panel:
    """The numbers of the step panel, as they are shown."""
    facts = page.locator(".root.facts")
    names = facts.locator("dt").all_text_contents()
    values = facts.locator("dd").all_text_contents()
    rows = _cells(page, ".root.bars .row:not(.head)", "[role=cell]")
    layers = _cells(page, ".root.lens tbody tr", "td, .pair span")
    return {
        "where": facts.locator(".where span").first.text_content(),
        "what": facts.locator(".what").text_content(),
        "facts": dict(zip(names, values, strict=True)),
        "considered": [tuple(row[:2]) for row in rows],
        "lens": [_layer(row) for row in layers],
        "settled": page.locator(".root.lens tr.settled td").first.text_content()
        if page.locator(".root.lens tr.settled").count()
        else None,
    }


def _cells(page: Page, rows: str, cells: str) -> list[list[str]]:
    """The texts of each row's cells, read at one moment: a row may be drawn anew at any other."""
    read = "(rows, cells) => rows.map(r => [...r.querySelectorAll(cells)].map(c => c.textContent))"
    found: list[list[str]] = page.locator(rows).evaluate_all(read, cells)
    return found


def _layer(cells: list[str]) -> tuple[str, str, str, str]:
    """(layer, top token, its probability, the chosen token's rank)."""
    return cells[0], cells[2], cells[3], cells[-1]


def expected_panel(step: Step, total: int) -> Panel:
    """What ``panel`` has to give for this step."""
    lens = step.lens
    assert lens is not None
    settled = lens.settle_layer
    return {
        "where": f"step {step.step_index + 1} of {total} · position {step.position}",
        "what": visible(step.token),
        "facts": {
            "prob": format_number(step.prob, 3),
            "rank": f"{step.rank:,}",
            "surprisal": format_number(-step.logprob, 2, " nats"),
            "entropy": format_number(step.entropy, 2, " nats"),
            "margin": format_number(step.margin, 3),
            "settled": "–" if settled is None else f"layer {settled}",
        },
        "considered": [
            (visible(token), format_number(prob, 3))
            for token, prob in zip(step.topk.tokens, step.topk.probs.tolist(), strict=True)
        ],
        "lens": [
            (
                str(layer),
                # A character that is told by its number, in short.
                re.sub("<U\\+0*([0-9A-F]+)>", r"U+\1", visible(lens.tokens[layer][0])),
                format_number(float(lens.probs[layer, 0]), 2),
                f"#{lens.chosen_rank[layer]:,}",
            )
            for layer in range(len(lens.tokens) - 1, -1, -1)
        ],
        "settled": None if settled is None else str(settled),
    }


def wait_for_panel(page: Page, step: Step, total: int) -> None:
    """Wait until the panel shows this step; its parts come one after another."""
    wanted = expected_panel(step, total)
    page.locator(".root.lens tr").first.wait_for()
    until(lambda: panel(page) == wanted, f"step {step.step_index + 1} in the panel")


def of(explorer: server.Explorer, reply: tuple[int, int], step: int | None = None) -> str:
    """The address of a reply, or of one step of it."""
    conversation, message = reply
    query = f"?conversation={conversation}&message={message}"
    return explorer.url + query + ("" if step is None else f"&step={step}")


def chosen(page: Page) -> int:
    """The index of the token that is marked as chosen."""
    index = page.locator(".root.reply:not(.given) .token.chosen").get_attribute("data-index")
    assert index is not None
    return int(index)


def overflow(page: Page) -> list[str]:
    """The parts of the page that are wider than the room they have."""
    return list(
        page.evaluate(
            """() => {
              const wide = [];
              const look = (node, name) => {
                if (node && node.scrollWidth > node.clientWidth + 1)
                  wide.push(`${name}: ${node.scrollWidth} in ${node.clientWidth}`);
              };
              look(document.documentElement, "document");
              look(document.querySelector("[data-testid=stMain]"), "main");
              look(document.querySelector("[data-testid=stSidebarContent]"), "sidebar");
              for (const column of document.querySelectorAll("[data-testid=stColumn]"))
                look(column, "column");
              return wide;
            }"""
        )
    )
