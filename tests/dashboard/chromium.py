"""Starting a real Chromium, wherever it is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

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


class NoBrowser(Exception):
    """No Chromium could be started."""


def launch(playwright: Playwright) -> Browser:
    """Start the Chromium that is installed here. Raises NoBrowser, with what was tried."""
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
    raise NoBrowser(f"No Chromium could be started. {INSTALL} Tried: {'; '.join(errors)}")
