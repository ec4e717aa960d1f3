"""The pages that people read, and the fenced blocks on them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `page` is its path in the repository, `language` what stands behind the fence."""

    page: str
    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0].rstrip()

    @property
    def key(self) -> tuple[str, str]:
        return self.page, self.first_line


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks() -> Iterator[Block]:
    for path in PAGES:
        for language, text in _FENCED.findall(path.read_text(encoding="utf-8")):
            yield Block(name_of(path), language, text)


def block(page: str, beginning: str) -> Block:
    """The one block of a page whose first line begins so."""
    (found,) = [each for each in blocks() if each.page == page and each.first_line.startswith(beginning)]
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks and without quoted messages."""
    text = _FENCED.sub("", read(page))
    return "\n".join(line for line in text.splitlines() if not line.startswith("> "))
