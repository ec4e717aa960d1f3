"""docs/llms.txt: what each page is about, for programs that read. `python -m tests.documents.llms` writes it.

The format is that of https://llmstxt.org: a heading, a summary, and lists of links. Order and names are those of the
site's navigation, a page's words are its own first paragraph.
"""

import re
import tempfile
from pathlib import Path
from typing import Final

from tests.documents import site
from tests.documents.nav import sections

PATH: Final = site.ROOT / "docs" / "llms.txt"
_SKIPPED: Final = re.compile(r"^(#|<!--|!\[|\||```|$)")


def first_paragraph(text: str) -> str:
    """The first paragraph of prose as one line, its links as their words. "" if a page has none."""
    for part in text.split("\n\n"):
        if not _SKIPPED.match(part.strip()):
            words = " ".join(part.split())
            return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words).replace("**", "")
    return ""


def rendered(pages: Path) -> str:
    """The file's text. `pages`: the folder of the site's pages, as `site.write_pages` makes it."""

    def words(page: str) -> str:
        return first_paragraph((pages / page).read_text(encoding="utf-8"))

    lines = ["# knapper", "", f"> {words('index.md')}"]
    for section, links in sections().items():
        if section:
            lines += ["", f"## {section}", "", *(f"- [{name}]({page}): {words(page)}" for name, page in links)]
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site.write_pages(Path(folder))
        PATH.write_text(rendered(Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
