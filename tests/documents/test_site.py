"""The documentation as a site: every page is on it once, its links resolve, and a request to elsewhere is noticed.

`make site` builds it, strictly; these tests need no MkDocs.
"""

import re
from pathlib import Path

import pytest

from tests.documents import site
from tests.documents.nav import sections

_CSP = "<meta content=\"default-src 'self'; img-src 'self'\">"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages")
    site.write_pages(out)
    return out


def test_every_page_stands_once_in_the_order_of_reading(pages: Path) -> None:
    shown = [page for links in sections().values() for _, page in links]
    assert len(shown) == len(set(shown))
    found = {str(path.relative_to(pages)) for path in pages.rglob("*.md")}
    assert set(shown) == {name for name in found if not re.match(r"decisions/0", name)}


def test_every_link_of_a_page_leads_to_one_of_the_site(pages: Path) -> None:
    links = 0
    for page in pages.rglob("*.md"):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"`[^`]*`", "", prose)):
            if not target.startswith("https://") and not target.startswith("http://"):
                assert (page.parent / target).is_file(), f"{page.relative_to(pages)}: {target}"
                links += 1
    assert links > 200


@pytest.mark.parametrize(
    ("source", "written", "read"),
    [
        ("README.md", "[a](docs/jobs.md#x) [b](#losses)", "[a](jobs.md#x) [b](#losses)"),
        ("README.md", "![a](docs/demo.png) [b](https://x.y/docs/jobs.md)", "![a](demo.png) [b](https://x.y/docs/jobs.md)"),
        ("docs/jobs.md", "[its `code`](../knapper/limits.py), [x](../README.md)", "its `code`, [x](index.md)"),
        ("docs/decisions/0001-bells-are-answered-by-a-stream-of-commits.md", "[a](../jobs.md)", "[a](../jobs.md)"),
        ("docs/jobs.md", "```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
    ],
)  # fmt: skip
def test_links_are_those_of_the_site(source: str, written: str, read: str) -> None:
    assert site.linked(written, source, site.places()) == read


@pytest.mark.parametrize(
    "asks",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css">',
        '<img alt="" srcset="a.png 1x, https://x.y/b.png 2x">',
        '<p style="background: url(https://x.y/b.png)">',
        "<style>@import 'https://x.y/b.css';</style>",
    ],
)
def test_a_request_to_elsewhere_is_found(asks: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f"{_CSP}<img src='a.png'><img src='data:image/png;base64,AA'>{asks}")
    assert len([*site.foreign(tmp_path)]) == 1


def test_what_a_reader_may_follow_is_no_request(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f'{_CSP}<a href="https://x.y">x</a><link rel="icon" href="../icon.png">')
    (tmp_path / "a.css").write_text("body { background: url('../a.png') }")
    assert [*site.foreign(tmp_path)] == []


def test_a_page_that_lets_scripts_ask_others_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>no policy</p>")
    assert [*site.foreign(tmp_path)] == ["index.html: no Content-Security-Policy"]
    assert "default-src 'self';" in (site.ROOT / "docs" / "theme" / "main.html").read_text()
