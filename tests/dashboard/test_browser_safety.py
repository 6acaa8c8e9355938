"""In a real browser: pages of others, links, and what a page shows when it cannot be drawn."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

if not os.environ.get("OKI_TRACE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="pip install playwright")

from playwright.sync_api import Browser, Page, expect

from oki_trace.sanitize import inert
from tests.dashboard import browser_pages, sample_stores, server
from tests.waiting import until

pytestmark = pytest.mark.browser

Browse = Callable[..., Page]

# What the pages themselves refer to.
OURS = {"https://duckdb.org/docs/stable/sql/introduction"}


# --------------------------------------------------------------------------- pages of others

ATTACK = """<!doctype html><title>elsewhere</title>
<iframe id=framed src="{explorer}"></iframe>
<script>
  const socket = new WebSocket("{explorer}_stcore/stream".replace("http", "ws"), ["streamlit"]);
  socket.onopen = () => {{ window.socket = "open"; }};
  socket.onerror = () => {{ window.socket = "refused"; }};
  fetch("{explorer}_stcore/health", {{mode: "no-cors"}})
    .then(() => {{ window.fetched = "read"; }}, () => {{ window.fetched = "refused"; }});
</script>
"""


@contextmanager
def another_page(explorer: server.Explorer) -> Iterator[str]:
    """A page of somebody else, served from another port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(ATTACK.format(explorer=explorer.url).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_page_of_others_neither_frames_nor_reaches_the_explorer(
    explorer: server.Explorer, browser: Browser
) -> None:
    context = browser.new_context()
    context.set_default_timeout(browser_pages.TIMEOUT_MS)
    refused: list[str] = []
    with another_page(explorer) as address:
        page = context.new_page()
        page.on("console", lambda message: refused.append(message.text))
        page.goto(address)
        until(lambda: page.evaluate("window.socket && window.fetched"), "the attempts to end")
        assert page.evaluate("[window.socket, window.fetched]") == ["refused", "refused"]
        until(lambda: any("frame-ancestors" in line for line in refused), "the frame's refusal")
        assert page.frame_locator("#framed").get_by_test_id("stApp").count() == 0
    context.close()


# ------------------------------------------------------------------------------------- links


def pages(samples: sample_stores.Samples) -> dict[str, str]:
    """Every page, where it shows what is hostile; each with something to wait for."""
    conversation, message = samples.hostile
    place = f"conversation={conversation}&message={message}"
    return {
        "": ".st-key-recent button",
        f"?{place}&step=1": ".root.lens tr",
        "map": ".st-key-recent button",
        f"map?{place}&step=1": ".root.map canvas",
        "conversations": "[data-testid=stDataFrame] canvas",
        f"compare?left={message}&right={samples.long[1]}": ".root.compare",
        f"questions?question=uncertainty&view=token&conversation={conversation}": "[data-testid="
        "stDataFrame] canvas",
        f"questions?question=compare&view=step&first={message}:1&second={message}:2": "[data-"
        "testid=stDataFrame] canvas",
        "sql?sql=SELECT+title,content+FROM+conversation+JOIN+message+ON+true": "[data-testid="
        "stDataFrame] canvas",
        "store": ".root.amounts",
    }


def test_no_text_is_a_link_on_any_page(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    page = browse(explorer.url)
    for path, shown in pages(samples).items():
        page.goto(explorer.url + path)
        if path.startswith("sql"):
            page.get_by_role("button", name="Run query").click()
        page.locator(shown).first.wait_for()
        expect(page.get_by_test_id("stStatusWidget")).to_have_count(0)
        hrefs = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
        assert {href for href in hrefs if not href.startswith(explorer.url)} <= OURS, path
        assert page.locator("img[src*='example'], img[src*='evil']").count() == 0, path


def test_such_texts_are_shown_as_they_are(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """In the sidebar, where a title and a model's id stand in places that read Markdown."""
    page = browse(browser_pages.of(explorer, samples.hostile, 1))
    card = page.locator(".st-key-model-card")
    card.wait_for()
    assert "www.example.test/" in card.inner_text().replace("\u2060", "")
    titles = page.locator(".st-key-recent button p")

    def shown() -> list[str]:
        return [title.replace("\u2060", "") for title in titles.all_text_contents()]

    until(lambda: sample_stores.HOSTILE[1] in shown(), "the title, as it is")


def test_tables_offer_no_download_of_their_own(
    explorer: server.Explorer, browse: Browse, samples: sample_stores.Samples
) -> None:
    """It would hold formulas as they are; our own button guards them."""
    page = browse(explorer.url + "sql?sql=SELECT+'=1+1'+AS+formula")
    page.get_by_role("button", name="Run query").click()
    table = page.get_by_test_id("stDataFrame")
    table.locator("canvas").first.wait_for()
    table.hover()
    expect(page.get_by_role("button", name="Search").first).to_be_attached()
    assert page.get_by_role("button", name="Download as CSV").count() == 0
    expect(page.get_by_test_id("stDownloadButton").first).to_be_visible()


# ------------------------------------------------------------------------- what goes wrong

FAULTY = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
FLAG = Path({flag!r})

if __name__ == "__main__":
    import streamlit as st

    from dashboard import data, navigation

    def fail(*_, **__):
        raise KeyError("www.evil.test/?secret=1 [x](http://evil.test)")

    state = data.worker_state
    if not hasattr(data, "sound"):
        data.sound = data.worker_state
        data.worker_state = lambda: fail() if FLAG.exists() else data.sound()
        data.info = fail
    st.button("A callback that fails", on_click=fail)
    navigation.run()
else:
    import streamlit as st
    from starlette.middleware import Middleware

    from dashboard.boundary import uncaught
    from dashboard.guard import Guard

    app = st.App(__file__, middleware=[Middleware(Guard)], on_script_error=uncaught)
"""


@pytest.fixture(scope="module")
def faulty(
    samples: sample_stores.Samples, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[server.Explorer, Path]]:
    """An explorer with faults: on the Store page; in the worker's card while a file is there."""
    folder = tmp_path_factory.mktemp("faulty")
    flag, port = folder / "fail", server.free_port()
    script = folder / "Faulty.py"
    script.write_text(FAULTY.format(root=str(server.ROOT), flag=str(flag)), encoding="utf-8")
    shutil.copytree(server.ROOT / "dashboard" / ".streamlit", folder / ".streamlit")
    run = ["streamlit", "run", str(script), "--server.port", str(port)]
    explorer = server.start(run, samples.db, port, folder / "output.txt", folder)
    yield explorer, flag
    family = explorer.family()
    for process in family:
        process.terminate()
    psutil.wait_procs(family, timeout=20)
    explorer.process.wait(20)


def box(page: Page) -> str:
    """The one error box on the page, which has no link in it."""
    alert = page.get_by_test_id("stAlert").filter(has_text="bug in oki-trace")
    expect(alert).to_have_count(1)
    return alert.inner_text().replace("\u2060", "")


def test_an_unexpected_error_is_ours_to_tell(
    faulty: tuple[server.Explorer, Path], browse: Browse
) -> None:
    explorer, _ = faulty
    page = browse(explorer.url + "store")
    assert "KeyError" in box(page) and "secret" not in box(page)
    expect(page.get_by_role("button", name="Try again")).to_have_count(1)
    page.get_by_text("Details", exact=True).click()
    code = page.get_by_test_id("stCode")
    expect(code).to_contain_text("www.evil.test/?secret=1")
    expect(code).to_contain_text("Traceback")
    code.hover()
    expect(page.get_by_role("button", name="Copy to clipboard")).to_be_visible()
    hrefs = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
    assert [href for href in hrefs if not href.startswith(explorer.url)] == []
    assert page.get_by_test_id("stException").count() == 0
    # The other pages are there still.
    page.get_by_role("link", name="Conversations").click()
    page.get_by_test_id("stDataFrame").locator("canvas").first.wait_for()


def test_a_part_that_fails_later_is_told_in_its_place(
    faulty: tuple[server.Explorer, Path], browse: Browse, samples: sample_stores.Samples
) -> None:
    explorer, flag = faulty
    page = browse(browser_pages.of(explorer, samples.first, 1))
    page.locator(".root.lens tr").first.wait_for()
    try:
        flag.touch()
        assert "KeyError" in box(page)
        # What stood there stays.
        expect(page.locator(".root.reply:not(.given)")).not_to_have_count(0)
    finally:
        flag.unlink()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    page.locator(".root.lens tr").first.wait_for()


def test_what_fails_outside_of_any_view_offers_no_search(
    faulty: tuple[server.Explorer, Path], browse: Browse
) -> None:
    explorer, _ = faulty
    page = browse(explorer.url)
    page.get_by_role("button", name="A callback that fails").click()
    assert "KeyError" in box(page)
    assert page.get_by_test_id("stException").count() == 0
    page.get_by_text("Details", exact=True).click()
    expect(page.get_by_test_id("stCode")).to_contain_text("Traceback")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    page.get_by_test_id("stChatInputTextArea").wait_for()


def test_a_store_that_goes_is_a_sentence_and_comes_back(
    run_explorer: Callable[..., server.Explorer],
    browse: Browse,
    samples: sample_stores.Samples,
    tmp_path: Path,
) -> None:
    db = tmp_path / "copy.db"
    shutil.copy(samples.db, db)
    explorer = run_explorer(str(db))
    page = browse(browser_pages.of(explorer, samples.hostile, 1))
    page.locator(".root.lens tr").first.wait_for()
    aside = db.with_name("aside")
    db.rename(aside)
    page.reload()
    alert = page.get_by_test_id("stAlert")
    expect(alert).to_contain_text("was deleted")
    expect(alert).to_have_count(1)
    assert page.get_by_text("Traceback").count() == 0
    aside.rename(db)
    page.get_by_role("button", name="Try again").click()
    page.locator(".root.lens tr").first.wait_for()
    expect(alert).to_have_count(0)


# ---------------------------------------------------------------- every place that reads Markdown

PLACES = """
import json
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import streamlit as st

from dashboard.viewdata import wording

made = wording.escape if st.query_params.get("as") == "plain" else str
for number, text in enumerate(json.loads(Path({texts!r}).read_text("utf-8"))):
    shown = made(text)
    with st.container(key=f"text-{{number}}"):
        st.caption(shown)
        st.markdown(f"before {{shown}} after")
        st.markdown(f"**{{shown}}**")
        st.error(shown)
        st.button(shown, key=f"button-{{number}}")
        st.expander(shown)
        st.badge(shown)
        st.metric(shown, 1)
        st.progress(0.5, shown)
"""
TEXTS = (
    *sample_stores.HOSTILE[:6],
    "WWW.Example.test http:x https://example.test mailto:me@example.test xmpp:me@example.test",
    "<https://example.test> [a]: https://example.test [a] ![i](https://example.test/i.png)",
    ":smile: :+1: :material/home: :red[x] :red-background[y] :streamlit: :blue-badge[z]",
    "-> <- <-> -- >= <= ~= ~~s~~ _e_ *e* __b__ `c` ``d`` $x$ $$y$$ \\(z\\)",
    "# heading",
    "1. one",
    "2) two",
    "- list",
    "+ list",
    "> quote",
    "a | b",
    "&lt;b&gt; &amp; &#42;",
    "a\\*b\\\\ \\[x\\](http://example.test)",
    "[^1] [x] - [ ] box",
    "x" * 300 + "www.example.test",
    "(www.example.test) 'www.example.test' *www.example.test* _www.example.test_",
)


MARKUP = "em, strong, del, code, h1, li, blockquote, td, .katex, [data-testid=stIconMaterial]"


def test_plain_text_is_plain_wherever_markdown_is_read(browser: Browser, tmp_path: Path) -> None:
    texts, script, port = tmp_path / "texts.json", tmp_path / "places.py", server.free_port()
    texts.write_text(json.dumps(TEXTS), encoding="utf-8")
    script.write_text(PLACES.format(root=str(server.ROOT), texts=str(texts)), encoding="utf-8")
    options = ["--server.port", str(port), "--server.address", "127.0.0.1"]
    options += ["--server.headless", "true", "--browser.gatherUsageStats", "false"]
    run = ["streamlit", "run", str(script), *options]
    explorer = server.start(
        run, str(tmp_path / "store.db"), port, tmp_path / "output.txt", tmp_path
    )
    context = browser.new_context()
    context.set_default_timeout(browser_pages.TIMEOUT_MS)
    # What the raw texts ask for is not fetched.
    context.route(lambda address: f":{port}/" not in address, lambda route: route.abort())
    try:
        page = context.new_page()
        page.goto(f"{explorer.url}?as=plain")
        page.locator(f".st-key-text-{len(TEXTS) - 1} [role=progressbar]").wait_for()
        assert page.locator("a[href^=http], a[href^=mailto], a[href^=xmpp], img").count() == 0
        for number, text in enumerate(TEXTS):
            at = page.locator(f".st-key-text-{number}")
            for part in ("stCaptionContainer", "stAlertContainer", "stMetricLabel"):
                told = at.get_by_test_id(part).first.text_content() or ""
                assert told.replace("\u2060", "") == inert(text), (part, text)
            caption = at.get_by_test_id("stCaptionContainer").locator(MARKUP)
            assert caption.count() == 0, text
        # Without it, all of that is there: the test sees what it forbids.
        page.goto(explorer.url)
        page.locator(f".st-key-text-{len(TEXTS) - 1} [role=progressbar]").wait_for()
        assert page.locator("a[href^=http]").count() > 20
        assert page.locator("[data-testid=stCaptionContainer] em").count() > 0
    finally:
        context.close()
        for process in explorer.family():
            process.terminate()
        explorer.process.wait(20)
