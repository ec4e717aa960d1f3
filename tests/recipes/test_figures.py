"""No figure of a recipe stands anywhere that no run produced: pages and notebooks agree with the stored results."""

import re
from dataclasses import asdict, fields
from importlib import import_module

import pytest
from nbformat import NotebookNode

from recipes.common import Curve, Result, Table
from tests.recipes import notebooks, pages
from tests.recipes.notebooks import RECIPES, ROOT


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_readme_shows_the_stored_result(recipe: str) -> None:
    assert (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8") == pages.readme(recipe)


def test_the_overview_shows_the_stored_results() -> None:
    assert pages.OVERVIEW.read_text(encoding="utf-8") == pages.overview()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_notebook_has_the_outputs_of_the_stored_run(recipe: str) -> None:
    notebook, stored = notebooks.read(recipe), pages.result(recipe)
    for table in (stored["figures"], *stored["more"].values()):
        assert Table(**table).markdown() in notebooks.printed(notebook)
    shown = [output.data["image/svg+xml"] for output in _displayed(notebook)]
    assert len(shown) == 1
    for values in stored["curves"].values():
        assert _points(shown[0]) >= len(values), "it is a curve of as many steps"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "all cells, in order, of one run"


def _displayed(notebook: NotebookNode) -> list[NotebookNode]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in outputs if "image/svg+xml" in output.get("data", {})]


def _points(svg: str) -> int:
    return svg.count("<use ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stored_run_is_of_the_real_model_with_the_default_options(recipe: str) -> None:
    stored = pages.result(recipe)
    assert set(stored) == {field.name for field in fields(Result)}
    assert stored["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert stored["options"] == asdict(import_module(f"recipes.{recipe}.train").Options())


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_figure_of_a_run_stands_beside_the_tables(recipe: str) -> None:
    text = (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8")
    prose = re.sub(re.escape(pages.BEGIN) + ".*?" + re.escape(pages.END), "", text, flags=re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)? ?%|(?<![\w.])\d+\.\d+(?![\w.])|\d+ (?:s|seconds|minutes)\b", prose) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_readme_says_how_to_run_it(recipe: str) -> None:
    text = (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8")
    assert f"python -m recipes.{recipe}.train" in text
    assert "--model" in text
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert (ROOT / "recipes" / recipe / target).exists(), target
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_a_wrong_figure_would_be_seen() -> None:
    shown = Table(["", "before", "after"], [["right", 0.0, 0.95]]).markdown()
    assert shown.splitlines()[-1] == "| right | 0 | 0.95 |"
    assert shown != Table(["", "before", "after"], [["right", 0.0, 0.94]]).markdown()
    assert _points(Curve({"a": [1.0, 2.0, 3.0]}, "b")._repr_svg_()) >= 3
