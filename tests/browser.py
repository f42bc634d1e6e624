"""A real headless Chromium for tests: which one is used, and how it is started.

It is looked for in `APPRENTICE_CHROMIUM`, then on the PATH, then where playwright installs its own. A test that finds
none is skipped and says how to get one.

Example::

    @pytest.fixture(scope="module")        # not wider: playwright's loop would be in the way of tests with asyncio
    def chromium() -> Iterator[Browser]:
        with open_chromium() as browser:
            yield browser
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

VARIABLE = "APPRENTICE_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",  # tests run as root in containers; the only pages that are opened are our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_MISSING = (
    f"no Chromium: install chromium or google-chrome, name one in {VARIABLE}, or run "
    "`python -m playwright install chromium`"
)


def chromium_path(own: str = "") -> str | None:
    """Of the first that is there; `own` is where playwright would have its own."""
    named = os.environ.get(VARIABLE)
    found = [named, *map(shutil.which, NAMES), own]
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """Skips the test that asks where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        path = chromium_path(playwright.chromium.executable_path)
        if path is None:
            pytest.skip(_MISSING)
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
