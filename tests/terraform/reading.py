"""Terraform's files, parsed: what blocks they have, and what those refer to."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hcl2

TERRAFORM = Path(__file__).parents[2] / "terraform"
Document = dict[str, Any]


@cache
def documents() -> dict[Path, Document]:
    """Every module and stage, by directory."""
    places = {path.parent for path in TERRAFORM.rglob("*.tf") if ".terraform" not in path.parts}
    return {place: read(place) for place in sorted(places)}


def read(directory: Path) -> Document:
    """All files of one directory, taken together: Terraform knows no smaller unit."""
    together: Document = {}
    for path in sorted(directory.glob("*.tf")):
        with path.open(encoding="utf-8") as file:
            for key, value in hcl2.load(file).items():
                if isinstance(value, list):
                    together.setdefault(key, []).extend(value)
    return together


def blocks(document: Document, word: str) -> Iterator[tuple[str, str, Document]]:
    """(type, name, body) of resource and data blocks; of others the type is empty."""
    for each in document.get(word, []):
        for first, rest in each.items():
            if first.startswith("__"):
                continue
            if word in ("resource", "data"):
                for second, body in rest.items():
                    if not second.startswith("__"):
                        yield plain(first), plain(second), body
            else:
                yield "", plain(first), rest


def plain(text: str) -> str:
    return text.strip('"')


def text_of(value: Any) -> str:
    """All expressions below a value, as one text to look for references in."""
    if isinstance(value, dict):
        return "\n".join(text_of(each) for key, each in value.items() if key != "__comments__")
    if isinstance(value, list):
        return "\n".join(text_of(each) for each in value)
    return str(value)


def names(pattern: str, value: Any) -> set[str]:
    return set(re.findall(pattern, text_of(value)))
