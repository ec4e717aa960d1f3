"""`knapper runs` beside a running server: what a user sees of a run in a terminal."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tinker

from knapper.cli.runs_client import left, sparks
from tests.conformance import loops
from tests.conformance.server import Server

NewClient = Callable[..., tinker.TrainingClient]


@pytest.fixture
def knapper(server: Server) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "PYTHONIOENCODING": "utf-8"}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "knapper", "runs", *arguments]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=60)

    return run


def test_a_run_is_listed_shown_watched_and_compared(
    new_client: NewClient, knapper: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    client, other = new_client(), new_client()
    loops.step(client, loops.rollouts(loops.clean_steps(client, 3)))
    loops.clean_steps(other, 2)
    run = client.model_id

    listed = knapper("list", "--limit", "100").stdout
    (line,) = [line for line in listed.splitlines() if line.startswith(run)]
    assert line.endswith("1 alarm")
    (line,) = [line for line in listed.splitlines() if line.startswith(other.model_id)]
    assert "alarm" not in line

    shown = knapper("show", run).stdout
    assert f"{run}: idle, step 4" in shown
    assert "alarm stale_sampler at step 4: all 2 rollouts of step 4 were drawn by weights" in shown
    assert "staleness  1\n           1 |" in shown
    assert "█" in shown
    assert json.loads(knapper("show", run, "--json").stdout)["alarms"][0]["name"] == "stale_sampler"
    only = knapper("show", run, "--metric", "grad_norm").stdout
    assert "grad_norm  " in only
    assert "staleness" not in only.replace("'staleness'", "")

    watched = knapper("watch", run, "--steps", "4").stdout
    assert [line.split()[1] for line in watched.splitlines() if line.startswith("step")] == ["1/4", "2/4", "3/4", "4/4"]
    assert watched.splitlines()[-1].startswith("alarm stale_sampler at step 4: ")

    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        logged = knapper("watch", run, "--steps", "4", "--log-to", f"tensorboard:{tmp_path}")
        assert logged.returncode == 0, logged.stderr
    events = tensorboard.EventAccumulator(str(tmp_path / run.replace(":", "-")))
    events.Reload()
    assert [each.step for each in events.Scalars("staleness")] == [1, 2, 3, 4], "the second time there was nothing new"

    compared = knapper("compare", run, other.model_id, "--metric", "grad_norm").stdout
    assert f"{run}  " in compared
    assert "after 4 steps" in compared
    assert "after 2 steps" in compared


def test_what_is_wrong_is_said(
    new_client: NewClient, knapper: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    client = new_client()
    loops.clean_steps(client, 1)
    wrong = knapper("show", client.model_id, "--metric", "lost/mean")
    assert wrong.returncode == 1
    assert "no step has the metric 'lost/mean'; allowed: " in wrong.stderr
    assert knapper("show", "ses-00000000000000000000000000000000:train:0").returncode == 1
    nothing = knapper("compare", client.model_id, "--metric", "reward/mean")
    assert "none of these runs has the metric 'reward/mean'" in nothing.stderr


def test_the_end_is_estimated_by_the_pace_of_the_newest_steps() -> None:
    points = [{"step": float(n), "at": 10.0 * n} for n in range(1, 5)]
    assert left(points, 10) == "ends in about 1:00"
    assert left(points, None) == left(points, 4) == left(points[:1], 10) == ""


def test_a_job_s_metrics_are_a_line_each() -> None:
    points = [{"step": n, "reward/mean": n / 4} for n in range(1, 5)]
    assert list(sparks(points, ["reward/mean", "loss/mean"])) == ["reward/mean              ▁▃▆█  0.25 -> 1"]
