"""A real browser, the explorer as users start it, and stores with something to see."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from explorers import HOME, ROOT, Explorer, free_port, start
from stories import Stories, tell

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

# As Home.py does: an installed wheel has the pages elsewhere.
sys.path.insert(0, str(ROOT))

QUIET = (
    "--no-sandbox",  # a container's root may not make one
    "--disable-gpu",
    "--no-first-run",
    # What the browser itself would like to fetch.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")
INSTALL = (
    "Install one with `apt-get install chromium` or `python -m playwright install chromium`, or "
    "set OKI_TRACE_CHROMIUM to the path of a Chromium, Chrome or Edge."
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium that is installed here, with a new profile."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _no_browser("Playwright is not installed: run `pip install playwright`.")
    with sync_playwright() as playwright:
        browser = _launch(playwright)
        yield browser
        browser.close()


def _launch(playwright: Playwright) -> Browser:
    from playwright.sync_api import Error

    chromium = playwright.chromium
    named = os.environ.get("OKI_TRACE_CHROMIUM")
    if named:  # this one and no other: an error here is the answer
        return chromium.launch(executable_path=named, args=QUIET)
    paths = [path for name in NAMES if (path := shutil.which(name))]
    tries: list[Callable[[], Browser]] = [
        *[lambda path=path: chromium.launch(executable_path=path, args=QUIET) for path in paths],
        # Where installers put them on macOS and Windows, and Playwright's own.
        lambda: chromium.launch(channel="chrome", args=QUIET),
        lambda: chromium.launch(channel="msedge", args=QUIET),
        lambda: chromium.launch(args=QUIET),
    ]
    errors = []
    for launch in tries:
        try:
            return launch()
        except Error as error:
            errors.append(error.message.splitlines()[0])
    return _no_browser(f"No Chromium could be started. {INSTALL} Tried: {'; '.join(errors)}")


def _no_browser(why: str) -> Browser:
    if os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def run_explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Explorer]]:
    """Starts ``oki-trace ui`` on a store; a new and empty one when none is given."""
    with ExitStack() as running:

        def run(db: str | None = None) -> Explorer:
            folder = tmp_path_factory.mktemp("explorer")
            db = db or str(folder / "store.db")
            port = free_port()
            command = ["oki_trace", "ui", "--port", str(port), "--db", db]
            explorer = start(command, db, port, folder / "output.txt")
            running.callback(explorer.close)
            return explorer

        yield run


@pytest.fixture(scope="module")
def live(run_explorer: Callable[..., Explorer]) -> Explorer:
    """An explorer on a store that starts empty, to chat in."""
    return run_explorer()


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Stories:
    """A store with a real conversation of smollm2, and others that seldom happen."""
    return tell(str(tmp_path_factory.mktemp("stories") / "store.db"), smollm2_dir.parent)


@pytest.fixture(scope="module")
def told(run_explorer: Callable[..., Explorer], stories: Stories) -> Explorer:
    """An explorer on the store of ``stories``, to look at."""
    return run_explorer(stories.db)


@pytest.fixture
def streamlit_run(tmp_path: Path) -> Iterator[Callable[[str], Explorer]]:
    """Starts ``streamlit run dashboard/Home.py``, by its path, from a folder that is not ours."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ExitStack() as running:

        def run(db: str) -> Explorer:
            port = free_port()
            command = ["streamlit", "run", str(HOME), "--server.port", str(port)]
            explorer = start(command, db, port, tmp_path / "output.txt", elsewhere)
            running.callback(explorer.close)
            return explorer

        yield run
