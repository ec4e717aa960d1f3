"""docs/llms.txt is what the pages say today, and its links lead to pages of the site."""

import re
from pathlib import Path

import pytest

from tests.documents import llms, site
from tests.documents.nav import sections


def test_it_is_current(tmp_path: Path) -> None:
    site.write_pages(tmp_path)
    text = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    assert text == llms.rendered(tmp_path), "python -m tests.documents.llms"
    links = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): (.+)$", text, flags=re.MULTILINE)
    assert [page for page, _ in links] == [page for name, below in sections().items() if name for _, page in below]
    assert all((tmp_path / page).is_file() and len(words) > 40 for page, words in links)


@pytest.mark.parametrize(
    ("text", "paragraph"),
    [
        ("# A\n\n<!-- x -->\n\nOne [two](three.md)\n**four**.\n\nFive.", "One two four."),
        ("# A\n\n| a |\n|---|\n\n```sh\nx\n```\n\n![i](i.png)\n\nOne.", "One."),
        ("# A\n", ""),
    ],
)
def test_a_first_paragraph_is_prose_on_one_line(text: str, paragraph: str) -> None:
    assert llms.first_paragraph(text) == paragraph
