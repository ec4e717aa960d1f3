"""The recipes' figures on pages: each recipe's README, and the overview of all of them, from stored results."""

import json
import re
from typing import Any, Final

from recipes.common import Table
from tests.recipes.notebooks import RECIPES, ROOT

OVERVIEW: Final = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- figures: python -m tests.recipes.write -->", "<!-- end of figures -->"


def result(recipe: str) -> dict[str, Any]:
    """As the last run that was kept left it."""
    stored: dict[str, Any] = json.loads((ROOT / "recipes" / recipe / "result.json").read_text(encoding="utf-8"))
    return stored


def readme(recipe: str) -> str:
    """The README with the result's tables between the marks."""
    stored = result(recipe)
    tables = [Table(**stored["figures"]).markdown()]
    tables += [f"{title.capitalize()}:\n\n{Table(**table).markdown()}" for title, table in stored["more"].items()]
    text = (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8")
    return _between(text, "\n\n".join(tables))


def overview() -> str:
    """The page with a row for each recipe: its title, and the first figure of its result."""
    rows = []
    for recipe in RECIPES:
        title = (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8").partition("\n")[0]
        (what, *values), columns = _strings(recipe)
        shown = " -> ".join(values)
        link = f"[{title.removeprefix('# ')}](../recipes/{recipe}/README.md)"
        rows.append([link, f"{what}, {' and '.join(columns[1:])}", shown])
    return _between(OVERVIEW.read_text(encoding="utf-8"), Table(["recipe", "what is measured", ""], rows).markdown())


def _strings(recipe: str) -> tuple[list[str], list[str]]:
    """(cells of the first row, columns), as the table shows them."""
    stored = result(recipe)["figures"]
    first = Table(stored["columns"], stored["rows"][:1]).markdown().splitlines()[-1]
    return [cell.strip() for cell in first.strip("|").split("|")], stored["columns"]


def _between(text: str, content: str) -> str:
    assert text.count(BEGIN) == text.count(END) == 1, "one pair of marks, between which the figures stand"
    return re.sub(
        re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: f"{BEGIN}\n\n{content}\n\n{END}", text, flags=re.DOTALL
    )
