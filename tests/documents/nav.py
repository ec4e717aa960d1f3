"""The order of reading, as mkdocs.yml has it."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


class _Loader(yaml.SafeLoader):
    """Tags of MkDocs' own, which name functions, are read as nothing: the navigation has none."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def sections() -> dict[str, list[tuple[str, str]]]:
    """(title, page) in order below each heading; those of no heading below the empty one."""
    with (ROOT / "mkdocs.yml").open(encoding="utf-8") as file:
        entries: list[dict[str, Any]] = yaml.load(file, _Loader)["nav"]  # noqa: S506  a SafeLoader
    found: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        ((name, below),) = entry.items()
        if isinstance(below, str):
            found.setdefault("", []).append((name, below))
        else:
            found[name] = [pair for each in below for pair in each.items()]
    return found
