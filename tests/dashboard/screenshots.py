"""Takes the README's screenshots: ``make pictures``.

A new store with the demo's conversation, the explorer as users start it, a real
Chromium; the pictures go to ``docs/images``, or to the folder given.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.dashboard import chromium, server

# Of the demo's first reply, the step that says " Paris".
PARIS = "conversation=1&message=2&step=5"
# The README's given text, and the first digit of its second reading.
CODE = "My code is 7 4 9 2 1. Repeat: my code is 7 4 9 2 1."
READ_AGAIN = "conversation=2&message=5&position=20"
# The README's branch: the reply to this question, and the branch that begins otherwise.
SPIDER = "How many legs does a spider have?"
BRANCH = "conversation=3&branch=8&message=8&step=0"
WIDTH, HEIGHT = 1440, 1000


def ready(page: Page, address: str, mark: str) -> None:
    """Open ``address`` and wait until all of it is drawn."""
    page.goto(address)
    page.locator(mark).first.wait_for()
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")
    page.wait_for_timeout(1500)  # fonts and pictures have no sign of being done


def take(to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        db = str(Path(scratch) / "store.db")
        for arguments in (
            ["demo", "--no-ui"],
            ["score", CODE],
            ["run", SPIDER, "--max-new-tokens", "30"],
            ["branch", "7", "0", "--rank", "2"],
        ):
            made = [sys.executable, "-m", "oki_trace", *arguments, "--db", db]
            subprocess.run(made, cwd=server.ROOT, check=True)
        port = server.free_port()
        command = ["oki_trace", "ui", "--port", str(port), "--db", db]
        explorer = server.start(command, db, port, Path(scratch) / "output.txt")
        try:
            with sync_playwright() as playwright:
                browser = chromium.launch(playwright)
                for name, query, mark, scheme in (
                    ("chat-light", f"?{PARIS}", ".root.lens tr", "light"),
                    ("map-dark", f"map?{PARIS}", ".root.map canvas", "dark"),
                    ("score-light", f"?{READ_AGAIN}", ".root.lens tr", "light"),
                    ("branch-light", f"?{BRANCH}", ".root.lens tr", "light"),
                    ("questions-light", "questions?question=settle", "svg.marks", "light"),
                ):
                    page = browser.new_page(
                        viewport={"width": WIDTH, "height": HEIGHT},
                        color_scheme="light" if scheme == "light" else "dark",
                    )
                    ready(page, explorer.url + query, mark)
                    page.screenshot(path=to / f"{name}.png")
                browser.close()
        finally:
            explorer.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]) if len(sys.argv) > 1 else server.ROOT / "docs" / "images")
