"""The regression check can fail, and asks for what is measured."""

import json
from pathlib import Path

import pytest

from benchmarks import check
from knapper.engine.training.prefix_sharing import Prefixes
from tests.engine.tiny import tiny_model

FLOORS = json.loads(check.FLOORS.read_text())


def test_what_the_engine_computes_is_within_its_floors_and_a_lost_optimisation_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path)
    values = check.computed(model)
    assert set(values) < set(FLOORS)
    assert check.lost(values, {name: FLOORS[name] for name in values}) == []
    monkeypatch.setattr(Prefixes, "_walk", lambda *_: [])  # nothing is found to be in common
    (complaint,) = check.lost(check.computed(model), {name: FLOORS[name] for name in values})
    assert complaint.startswith("tokens of a group over rows computed: 1, and must be at least 2.8")


def test_a_figure_without_a_floor_and_a_floor_without_a_figure_are_told() -> None:
    floors = {"rows": {"at_most": 3, "holds": "x"}, "gone": {"at_least": 1, "holds": "y"}}
    assert check.lost({"rows": 3, "gone": 1}, floors) == []
    assert check.lost({"rows": 4, "gone": 0.5, "new": 1}, floors) == [
        "new: has no floor in floors.json",
        "rows: 4, and must be at most 3; it holds x",
        "gone: 0.5, and must be at least 1; it holds y",
    ]
    assert check.lost({"rows": 1}, floors) == ["gone: was not measured"]
