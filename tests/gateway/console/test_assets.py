"""What others made is what their packages hold, byte by byte, and pages name it by its content."""

import hashlib
import re

from gateway.console import assets
from tests.gateway.console.conftest import World


def test_vendored_files_are_those_of_their_packages() -> None:
    for name, sha256 in assets.VENDORED.items():
        assert hashlib.sha256(assets.found()[name].content).hexdigest() == sha256, name
    ours = set(assets.found()) - set(assets.VENDORED)
    assert ours == {"console.css", "console.js", "icon.svg"}


def test_pages_load_nothing_but_these_and_browsers_check_them(world: World) -> None:
    page = world.browser().get("/signin").text
    tags = re.findall(r"<(?:script|link)[^>]*>", page)
    assert len(tags) == 6
    for tag in tags:
        url = (re.search(r'(?:src|href)="(/static/[^"]+)"', tag) or [""])[1]
        answer = world.browser().get(url)
        assert answer.status_code == 200, tag
        assert "immutable" in answer.headers["cache-control"]
        if "icon" not in tag:
            assert assets.integrity(url.partition("?")[0].rpartition("/")[2]) in tag
    assert " on" not in re.sub(r">[^<]*<", "><", page).replace(" one", ""), "no handlers in attributes"
    assert not re.search(r"<script(?![^>]*src=)|style=|<style", page), "no scripts or styles in the page"


def test_only_names_of_files_that_there_are_lead_anywhere(world: World) -> None:
    for name in ("README.md", "..%2fassets.py", "%2e%2e/assets.py", "console.css/x", "x.js", "%00"):
        assert world.browser().get(f"/static/{name}").status_code == 404, name
