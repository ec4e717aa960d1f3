"""Screenshots of every page in both themes, for docs/console: `python -m tests.browser.screenshots`."""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import chromium
from tests.browser.world import World, pages, world

TO = Path(__file__).parents[2] / "docs" / "console"
JOB = "sums"
_COLOURS = 128  # of a page with few of them: a fifth of the bytes


def main() -> None:
    TO.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, world(Path(place)) as made:
        made.submit(JOB, steps=8)
        made.train(40)
        made.completed(JOB)
        with chromium.browser() as browser:
            for theme in ("light", "dark"):
                context = browser.new_context(viewport={"width": 1100, "height": 760}, color_scheme=theme)
                page = context.new_page()
                _take(page, made, "signin", "/signin", theme)
                _sign_in(page, made.url, made.keys["ops"])
                _take(page, made, "keys", "/admin", theme)
                context.clear_cookies()
                _sign_in(page, made.url, made.keys["alice"])
                for name, path in pages(made, JOB).items():
                    _take(page, made, name, path, theme)
                page.set_viewport_size({"width": 375, "height": 700})
                _take(page, made, "phone", f"/runs/{made.run}", theme)
                context.close()


def _sign_in(page: Page, url: str, key: str) -> None:
    page.goto(f"{url}/signin")
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Runs")


def _take(page: Page, made: World, name: str, path: str, theme: str) -> None:
    page.goto(f"{made.url}{path}")
    page.wait_for_timeout(1500)
    if name == "playground":
        page.get_by_label("Message").fill("and the")
        page.get_by_role("button", name="Send").click()
        page.wait_for_timeout(3000)
    to = TO / f"{name}-{theme}.png"
    page.screenshot(path=to)
    Image.open(to).convert("RGB").quantize(_COLOURS).save(to, optimize=True)
    sys.stdout.write(f"{to.name}: {to.stat().st_size // 1024} KiB\n")


if __name__ == "__main__":
    main()
