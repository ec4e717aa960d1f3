"""Headless Chromium, as Debian has it, by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def path() -> str:
    """Of the program. Skips the test where there is none, unless TEST_BROWSER=required, as CI has it."""
    found = next((where for name in _NAMES if (where := shutil.which(name))), None)
    if found is None and os.environ.get("TEST_BROWSER") == "required":
        pytest.fail("there is no chromium on this machine, and TEST_BROWSER=required: apt-get install -y chromium")
    if found is None:
        pytest.skip("there is no chromium on this machine: apt-get install -y chromium")
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path(), args=_FLAGS.split())
        try:
            yield chromium
        finally:
            chromium.close()
