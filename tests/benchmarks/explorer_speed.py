"""How quick the explorer is in a real browser: ``python -m tests.benchmarks.explorer_speed DB``.

DB is a store, as ``big_store.py`` makes it. Measured from the click to the
panel with the new token's lens on screen, in the browser's own clock; pages
from the request to their last part. Prints medians and the slowest, in
milliseconds. "open" loads the whole page anew, "go to" is a click within it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

from oki_trace.store.reading.reader import TraceReader
from tests.dashboard import chromium, server

# From the click until the panel's head and its lens are those of another step.
CLICK = """
index => new Promise(done => {
  // Where the elements are drawn in the page itself or in a shadow root.
  const all = (selector, root = document) => [
    ...root.querySelectorAll(selector),
    ...[...root.querySelectorAll('*')].filter(n => n.shadowRoot)
      .flatMap(n => all(selector, n.shadowRoot))];
  const token = all('.root.reply .token').find(n => Number(n.dataset.index) === index);
  const seen = () => [
    all('.root.facts .where')[0]?.textContent, all('.root.lens')[0]?.textContent];
  const before = seen();
  const began = performance.now();
  token.click();
  const look = () => {
    const now = seen();
    if (now[0]?.startsWith(`step ${index + 1} of`) && now[1] !== before[1])
      requestAnimationFrame(() => done(performance.now() - began));
    else if (performance.now() - began > 10_000) done(NaN);
    else setTimeout(look, 2);
  };
  look();
})
"""

# Whether something that the selector names is drawn, in the page or in an element's shadow root.
# Asked every few milliseconds: a locator's own waiting looks at ever longer intervals, in the end
# twice a second.
DRAWN = """
selector => [document, ...[...document.querySelectorAll('[data-testid=stBidiComponentIsolated]')]
  .map(host => host.shadowRoot)]
  .some(root => root?.querySelector(selector)?.getClientRects().length)
"""
POLL_MS = 10
ROUNDS = 6


def drawn(page: Page, mark: str, seconds: float = 30) -> None:
    """Wait until something that ``mark`` names is drawn."""
    page.wait_for_function(DRAWN, arg=mark, polling=POLL_MS, timeout=seconds * 1000)


def clicks(page: Page, indices: list[int]) -> list[float]:
    """Milliseconds from the click to the panel, token by token."""
    return [page.evaluate(CLICK, index) for index in indices]


def opened(page: Page, address: str, mark: str) -> float:
    """Milliseconds from asking for the address until ``mark`` is drawn."""
    began = time.perf_counter()
    page.goto(address)
    drawn(page, mark)
    return (time.perf_counter() - began) * 1000


def followed(page: Page, link: Locator, mark: str) -> float:
    """Milliseconds from a click on ``link`` until ``mark`` is drawn."""
    link.wait_for()
    began = time.perf_counter()
    link.click()
    drawn(page, mark)
    return (time.perf_counter() - began) * 1000


def told(name: str, values: list[float]) -> None:
    print(f"{name:44} median {statistics.median(values):6.0f}   slowest {max(values):6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("db")
    parser.add_argument("--conversation", type=int, default=500)
    db = parser.parse_args().db
    number = parser.parse_args().conversation
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        port = server.free_port()
        command = ["oki_trace", "ui", "--port", str(port), "--db", db]
        explorer = server.start(command, db, port, Path(folder) / "output.txt")
        browser = chromium.launch(playwright)
        try:
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            with TraceReader(db) as reader:
                left, right = (
                    next(m.id for m in reader.messages(c) if m.tokens) for c in (number, number + 1)
                )
            pages = {
                "chat, a conversation": (f"?conversation={number}", ".root.lens tr"),
                "chat, a reply of 600 tokens": ("?conversation=1", ".root.lens tr"),
                "chat, new": ("", "[data-testid=stChatInputTextArea]"),
                "reply map": (f"map?conversation={number}", ".root.map canvas"),
                "conversations": ("conversations", "[data-testid=data-grid-canvas]"),
                "compare": (f"compare?left={left}&right={right}", ".root.lens tr"),
                "questions": ("questions", ".st-key-picture-0 svg.marks"),
                "sql": ("sql", "[data-testid=data-grid-canvas]"),
                "store": ("store", ".root.table tr"),
            }
            query, mark = pages["chat, a conversation"]
            first = opened(page, explorer.url + query, mark)
            # The browser has read and compiled nothing yet.
            print(f"{'open: the first of all':44} {first:6.0f}")
            # Questions read what is new in the store first, once: minutes, with progress.
            page.goto(explorer.url + "questions")
            drawn(page, pages["questions"][1], seconds=600)
            times: dict[str, list[float]] = {name: [] for name in pages}
            for _ in range(ROUNDS + 1):
                for name, (query, mark) in pages.items():
                    times[name].append(opened(page, explorer.url + query, mark))
            for name, values in times.items():
                told(f"open: {name}", values[1:])
            within = {
                "Conversations": "[data-testid=data-grid-canvas]",
                "Questions": ".st-key-picture-0 svg.marks",
                "SQL": "[data-testid=data-grid-canvas]",
                "Store": ".root.table tr",
                "Chat": "[data-testid=stChatInputTextArea]",
            }
            gone: dict[str, list[float]] = {name: [] for name in [*within, "a conversation"]}
            for _ in range(ROUNDS):
                for name, mark in within.items():
                    link = page.get_by_role("link", name=name, exact=True)
                    gone[name].append(followed(page, link, mark))
                recent = page.locator(".st-key-recent button").first
                gone["a conversation"].append(followed(page, recent, ".root.lens tr"))
            for name, values in gone.items():
                told(f"go to: {name}", values)
            for name, one in (("100 tokens", number), ("600 tokens", 1), ("tensors kept", 2)):
                page.goto(f"{explorer.url}?conversation={one}")
                drawn(page, ".root.lens tr")
                page.wait_for_timeout(1500)
                told(f"click to panel: {name}", clicks(page, [7, 30, 12, 55, 13, 80, 3, 41, 90]))
        finally:
            browser.close()
            explorer.close()


if __name__ == "__main__":
    main()
