"""Pages are wrapped, so that a change shows as the lines that it changes; and sentences say who does what."""

import re

import pytest

from tests.documents.pages import PAGES, name_of, prose, read

COLUMNS = 120
_WRITTEN_BY_A_PROGRAM = ("docs/compatibility.md", "docs/cookbook.md")


@pytest.mark.parametrize("page", [name_of(path) for path in PAGES if name_of(path) not in _WRITTEN_BY_A_PROGRAM])
def test_lines_of_prose_are_at_most_120_columns(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > COLUMNS and not line.startswith(("|", "<!--"))]
    assert not long


@pytest.mark.parametrize("page", [name_of(path) for path in PAGES])
def test_a_sentence_names_its_actor(page: str) -> None:
    text = re.sub(r"`[^`]*`", "", prose(page))
    found = [line for line in text.splitlines() if re.search(r"\b(whoever|whomever|for whom)\b", line, re.IGNORECASE)]
    assert not [line for line in found if '"whoever"' not in line]
