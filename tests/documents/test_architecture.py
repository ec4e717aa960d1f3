"""docs/architecture.md and README's picture name what is there: files, what is defined in them, and the processes."""

import ast
import re
import tomllib

import pytest

from knapper.local.broker.triggers import TRIGGERS
from tests.documents.pages import ROOT, block, read

PAGE = "docs/architecture.md"
_TOP = "gateway|functions|knapper|knative|tests|benchmarks"
_NAMED = re.compile(rf"`((?:{_TOP})/[\w./-]*\w(?:/|\.\w+)?)(?:::(\w+))?`")
NAMED = sorted(set(_NAMED.findall(read(PAGE))))


def _defined(source: bytes) -> set[str]:
    """Functions, classes, methods and variables of a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize(("path", "symbol"), NAMED)
def test_what_the_page_names_is_there(path: str, symbol: str) -> None:
    place = ROOT / path
    assert place.is_dir() if path.endswith("/") else place.is_file(), f"{PAGE} names {path}, which is not there"
    if symbol:
        assert symbol in _defined(place.read_bytes()), f"{PAGE} names {path}::{symbol}, which is not defined there"


def test_nothing_that_looks_like_a_path_is_left_out() -> None:
    """Every code span with a slash and a suffix, or with '::', is one that is looked up."""
    prose = re.sub(r"^```.*?^```", "", read(PAGE), flags=re.MULTILINE | re.DOTALL)
    spans = {span for span in re.findall(r"`([^`\n]+)`", prose) if "::" in span or re.search(r"/\S+\.py", span)}
    assert spans == {f"{path}::{symbol}" if symbol else path for path, symbol in NAMED if symbol or ".py" in path}


@pytest.mark.parametrize("heading", ["The life of a request", "The life of a job"])
def test_a_life_has_ten_steps_in_order_each_with_a_file(heading: str) -> None:
    section = read(PAGE).partition(f"## {heading}\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^$)", section, flags=re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in steps] == list(range(1, 11))
    told_without_a_file = [text for _, text in steps if not _NAMED.search(text)]
    assert all("dev.knapper" in text or "runs/<hash>" in text for text in told_without_a_file), told_without_a_file


def _functions(picture: str) -> set[str]:
    inside = re.search(r"subgraph functions .*?\n(.*?)\n  end", picture, flags=re.DOTALL)
    assert inside
    return {line.strip() for line in inside[1].splitlines() if not line.strip().startswith("direction")}


def test_both_pictures_show_the_same_processes() -> None:
    pictures = [block("README.md", "flowchart LR").text, block(PAGE, "flowchart TB").text]
    there = {path.name for path in (ROOT / "functions").iterdir() if (path / "main.py").exists()}
    assert there >= {trigger.subscriber for trigger in TRIGGERS} - {"gateway"}
    for picture in pictures:
        assert _functions(picture) == there
        for node in ("gateway", "broker", "store", "exchange"):
            assert re.search(rf"\b{node}\b", picture), node
    table = read(PAGE).partition("## Processes\n")[2].partition("\n## ")[0]
    assert there <= set(re.findall(r"^\| (\w+) \|", table, flags=re.MULTILINE))


def _layers() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return list(found)


def test_every_package_has_its_layer() -> None:
    """One that has none could import anything, and be imported by all."""
    named = {name.strip().removeprefix("knapper.") for layer in _layers() for name in layer.split("|")}
    modules = [path.stem for path in (ROOT / "knapper").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]
    assert named == {"gateway", "functions"} | set(modules) - {"__init__"}


def test_the_page_shows_the_layers_of_the_contract() -> None:
    shown = read(PAGE).partition("## Layers\n")[2].partition("```\n")[2].partition("```")[0].splitlines()
    assert shown == [layer.replace("knapper.", "").removesuffix(" | __main__") for layer in _layers()]
