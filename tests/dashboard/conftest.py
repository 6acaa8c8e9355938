"""A real browser, the explorer as users start it, and stores with something to see."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import streamlit as st

from oki_trace.store.schema import migrate
from tests.dashboard import chromium, sample_stores, server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.dashboard import browser_pages

BOUNDARY = "dashboard.boundary"

# As Home.py does: an installed wheel has the pages elsewhere.
sys.path.insert(0, str(server.ROOT))


@pytest.fixture(autouse=True)
def no_view_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A page that fails unexpectedly shows a box, and raises nothing that a test would see.

    A test that wants one to fail clears ``caplog``.
    """
    yield
    failed = [record for record in caplog.get_records("call") if record.name == BOUNDARY]
    assert not failed, failed[0].exc_text or failed[0].exc_info


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium that is installed here, with a new profile."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _no_browser("Playwright is not installed: run `pip install playwright`.")
    with sync_playwright() as playwright:
        try:
            browser = chromium.launch(playwright)
        except chromium.NoBrowser as error:
            _no_browser(str(error))
        yield browser
        browser.close()


def _no_browser(why: str) -> NoReturn:
    if os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def run_explorer(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., server.Explorer]]:
    """Starts ``oki-trace ui`` on a store; a new and empty one when none is given."""
    with ExitStack() as running:

        def run(db: str | None = None) -> server.Explorer:
            folder = tmp_path_factory.mktemp("explorer")
            db = db or str(folder / "store.db")
            port = server.free_port()
            command = ["oki_trace", "ui", "--port", str(port), "--db", db]
            explorer = server.start(command, db, port, folder / "output.txt")
            running.callback(explorer.close)
            return explorer

        yield run


@pytest.fixture(scope="module")
def live(run_explorer: Callable[..., server.Explorer]) -> server.Explorer:
    """An explorer on a store that starts empty, to chat in."""
    return run_explorer()


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> sample_stores.Samples:
    """A store with a real conversation of smollm2, and others that seldom happen."""
    return sample_stores.build(
        str(tmp_path_factory.mktemp("samples") / "store.db"), smollm2_dir.parent
    )


@pytest.fixture
def open_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a store the explorer's, and gives its connections back in the end."""
    from dashboard import data

    yield lambda db: monkeypatch.setenv("OKI_TRACE_DB", db)
    data.reopen()
    st.cache_resource.clear()


@pytest.fixture
def empty_store(tmp_path: Path, open_store: Callable[[str], None]) -> str:
    db = str(tmp_path / "empty.db")
    migrate.ensure(db)
    open_store(db)
    return db


@pytest.fixture
def filled_store(
    samples: sample_stores.Samples, open_store: Callable[[str], None]
) -> sample_stores.Samples:
    open_store(samples.db)
    return samples


@pytest.fixture
def filled(
    samples: sample_stores.Samples, open_store: Callable[[str], None]
) -> sample_stores.Samples:
    open_store(samples.db)
    # What it takes to write the cache is no part of what is tested.
    from dashboard import data

    assert data.cache_backlog(60.0) is None
    return samples


@pytest.fixture(scope="module")
def explorer(
    run_explorer: Callable[..., server.Explorer], samples: sample_stores.Samples
) -> server.Explorer:
    """An explorer on the store of ``samples``, to look at."""
    return run_explorer(samples.db)


@pytest.fixture
def witness() -> browser_pages.Witness:
    from tests.dashboard import browser_pages

    return browser_pages.Witness()


@pytest.fixture
def browse(browser: Browser, witness: browser_pages.Witness) -> Iterator[Callable[..., Page]]:
    """Opens an address in a window of its own.

    Whatever a test does there, no request may leave the machine and nothing may
    complain in the browser's console.
    """
    from tests.dashboard import browser_pages

    with ExitStack() as contexts:

        def open_page(address: str, width: int = 1440, height: int = 1000) -> Page:
            context = browser.new_context(viewport={"width": width, "height": height})
            contexts.callback(context.close)
            context.set_default_timeout(browser_pages.TIMEOUT_MS)
            witness.watch(context)
            page = context.new_page()
            page.goto(address)
            page.get_by_test_id("stAppViewContainer").wait_for()
            return page

        yield open_page
    assert witness.abroad() == []
    assert witness.complaints == []


@pytest.fixture
def streamlit_run(tmp_path: Path) -> Iterator[Callable[[str], server.Explorer]]:
    """Starts ``streamlit run dashboard/Home.py``, by its path, from a folder that is not ours."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ExitStack() as running:

        def run(db: str) -> server.Explorer:
            port = server.free_port()
            command = ["streamlit", "run", str(server.HOME), "--server.port", str(port)]
            explorer = server.start(command, db, port, tmp_path / "output.txt", elsewhere)
            running.callback(explorer.close)
            return explorer

        yield run
