"""What `make drift` says of packages that changed. Installing the newest ones is left to the command itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tinker

from tests.drift import numbers, surface
from tests.drift.__main__ import failures
from tests.drift.environments import changed


def test_a_method_that_the_next_sdk_brings_is_named_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = surface.surface()
    assert "/api/v1/forward_backward" in ours["route"]
    assert "TrainingClient.forward_backward" in ours["method"]
    assert "SamplingParams.temperature" in ours["field"]
    assert surface.differences(ours, surface.surface()) == []

    def forecast(self: object, days: int) -> str:
        return f"{self}, {days}"

    monkeypatch.setattr(tinker.RestClient, "forecast_weather", forecast, raising=False)
    monkeypatch.delattr(tinker.RestClient, "publish_checkpoint_from_tinker_path")
    lines = surface.differences(ours, surface.surface())
    assert lines == [
        "gone method RestClient.publish_checkpoint_from_tinker_path",
        "new method RestClient.forecast_weather (self: object, days: int) -> str",
    ]


def test_a_field_that_became_required_is_a_change() -> None:
    ours = {"field": {"Datum.weights": "list[float], optional"}}
    newest = {"field": {"Datum.weights": "list[float]"}}
    assert surface.differences(ours, newest) == ["changed field Datum.weights: list[float], optional -> list[float]"]


def test_numbers_that_are_rounded_differently_are_told_from_other_numbers(tmp_path: Path) -> None:
    ours, newest = tmp_path / "ours.npz", tmp_path / "newest.npz"
    values = np.linspace(-5, -1, 7, dtype=np.float32)
    before = {"llama float32": values, "qwen3 float32": values, "gemma2 bfloat16": values, "gone float32": values}
    after = {"llama float32": values, "qwen3 float32": values + np.float32(1e-5), "gemma2 bfloat16": values + 1}
    np.savez(ours, allow_pickle=False, **before)
    np.savez(newest, allow_pickle=False, **after)
    assert numbers.differences(ours, ours) == []
    assert numbers.differences(ours, newest) == [
        "OTHER NUMBERS: gemma2 bfloat16, by 1.0e+00",
        "not computed in both: gone float32",
        "other last bits: qwen3 float32, by 1.0e-05",
    ]


def test_tests_that_fail_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_good(): pass\n\ndef test_bad(): assert 1 == 2\n")
    results = tmp_path / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", "test_it.py"]
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 1
    assert failures(results) == ["failed: test_it::test_bad"]
    assert failures(tmp_path / "none.xml") == ["failed: pytest wrote no results"]


def test_versions_that_changed_are_listed() -> None:
    assert changed({"torch": "2.13.0", "numpy": "2.4", "only": "1"}, {"torch": "2.14.1", "numpy": "2.4"}) == [
        "torch: 2.13.0 -> 2.14.1"
    ]
