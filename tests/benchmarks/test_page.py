"""docs/performance.md: its tables are made from what a run stored, and the tests that it names exist."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import figures, page
from benchmarks.figures import Figure, Pair

ROOT = Path(__file__).parent.parent.parent
MACHINE = {**figures.machine(), "load_1min": 0.25}


def stored(tmp_path: Path, **changes: object) -> dict[str, object]:
    found = [
        figures.faster("training", "a step | of two", Pair(2.0, 5.0, 0.31), ">= 1.8x", "2.7x", "with a note"),
        Figure("training", "quiet", 2.0, 5.0, "s", 2.5, spread=0.1),
        Figure("starting", "interpreter", 0.02, None, "s"),
    ]
    said = {
        "machine": MACHINE,
        "load_1min_after": 1.0,
        "took_s": 9,
        "failed": {},
        "model": "m",
        "quick": False,
        **changes,
    }
    figures.store(found, tmp_path / "bench.json", **said)
    read: dict[str, object] = json.loads((tmp_path / "bench.json").read_text())
    return read


def test_tables_stand_between_the_markers_and_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    empty = f"# Title\n{page.BEGIN}\nold\n{page.END}\nprose\n"
    once = page.written(empty, stored(tmp_path))
    assert once.startswith(f"# Title\n{page.BEGIN}\n")
    assert once.endswith(f"{page.END}\nprose\n")
    assert "old" not in once
    row = "| a step \\| of two | 2 s | 5 s | **2.50x** | >= 1.8x | 2.7x | with a note; repeats differ by 31 % |"
    assert row in once.splitlines()
    assert "| quiet | 2 s | 5 s | **2.50x** |  |  |  |" in once.splitlines()
    assert "| interpreter | 0.02 s |  |  |  |  |  |" in once.splitlines()
    assert page.written(once, stored(tmp_path)) == once
    assert "**Section sampling failed**" in page.written(once, stored(tmp_path, failed={"sampling": "OSError: no"}))


@pytest.mark.parametrize("broken", ["", page.BEGIN, f"{page.END}{page.BEGIN}", f"{page.BEGIN}{page.BEGIN}{page.END}"])
def test_a_page_without_its_markers_is_refused(tmp_path: Path, broken: str) -> None:
    with pytest.raises(ValueError, match="the page needs one"):
        page.written(broken, stored(tmp_path))


def test_the_page_can_be_written_and_each_optimisation_names_a_test_that_exists(tmp_path: Path) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    page.written(text, stored(tmp_path))
    section = text.partition("## What makes it fast")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", section, re.MULTILINE)[1:]
    assert len(rows) >= 10
    for what, named in rows:
        ((path, test),) = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", named) or [("", what)]
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{test}"
