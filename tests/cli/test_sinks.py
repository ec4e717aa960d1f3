"""`--log-to`: points arrive once each, whoever is killed between, read back by the library that they went to."""

import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from knapper.cli import sinks
from knapper.cli.jobs_client import JobsClient
from knapper.cli.jobs_follower import Follower
from knapper.errors import InvalidField

RUN = "ses-0123456789abcdef0123456789abcdef:train:0"
POINTS = [{"step": float(n), "at": 1e9 + n, "loss/mean": 1.0 / n, "staleness": 0.0} for n in range(1, 9)]


def scalars(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / RUN.replace(":", "-")), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: sorted((each.step, each.wall_time, round(each.value, 6)) for each in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


WANTED = {
    "loss/mean": [(n, 1e9 + n, round(1.0 / n, 6)) for n in range(1, 9)],
    "staleness": [(n, 1e9 + n, 0.0) for n in range(1, 9)],
}
KILLED = """
import os, signal, sys
from knapper.cli import sinks
from tests.cli.test_sinks import POINTS, RUN
forwarder = sinks.Forwarder([sinks.opened(sys.argv[1], RUN)])
forwarder.send(POINTS[:int(sys.argv[2])])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forwarder_that_is_killed_at_any_step_loses_no_point_and_doubles_none(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for steps in (3, 3, 6):
        command = [sys.executable, "-c", KILLED, f"tensorboard:{tmp_path}", str(steps)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    forwarder = sinks.Forwarder([sinks.opened(f"tensorboard:{tmp_path}", RUN)])
    forwarder.send(POINTS)
    forwarder.close()
    assert scalars(tmp_path) == WANTED


def test_a_record_that_was_cut_is_written_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    forwarder = sinks.Forwarder([sinks.opened(f"tensorboard:{tmp_path}", RUN)])
    forwarder.send(POINTS[:5])
    forwarder.close()
    (file,) = (tmp_path / RUN.replace(":", "-")).iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    forwarder = sinks.Forwarder([sinks.opened(f"tensorboard:{tmp_path}", RUN)])
    forwarder.send(POINTS)
    forwarder.close()
    assert scalars(tmp_path) == WANTED


class _Finished(JobsClient):
    """A server with a job of three steps, of which it tells those after the ones that were asked for."""

    def show(self, job: str, after: int = 0) -> dict[str, Any]:
        steps = [{"step": n, "at": f"2026-01-02T03:04:0{n}+00:00", "reward/mean": n / 4} for n in range(after + 1, 4)]
        started = "2026-01-02T03:04:00+00:00"
        return {"state": "completed", "kind": "rl", "step": 3, "steps": 3, "metrics": steps, "started_at": started}


def test_a_job_that_is_followed_is_forwarded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    client = _Finished("http://127.0.0.1:9", "tml-local")
    for _ in range(2):
        forwarder = sinks.Forwarder([sinks.opened(f"tensorboard:{tmp_path}", RUN)])
        Follower(client, "adding", lambda: 0.0, forwarder).follow()
        forwarder.close()
    client.close()
    rewards = scalars(tmp_path)["reward/mean"]
    assert [(step, value) for step, _, value in rewards] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert rewards[0][1] == datetime.fromisoformat("2026-01-02T03:04:01+00:00").timestamp()


def test_trackio_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "forwarder.close()")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path)}
    for steps in (3, 8):
        command = [sys.executable, "-c", code, "trackio:tests", str(steps)]
        subprocess.run(command, check=True, env=environment, timeout=60, capture_output=True)
    read = (
        "from trackio.sqlite_storage import SQLiteStorage as S; import json; from tests.cli.test_sinks import RUN;"
        "print(json.dumps([each['step'] for each in S.get_logs('tests', RUN.replace(':', '-'))]))"
    )
    done = subprocess.run([sys.executable, "-c", read], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[1, 2, 3, 4, 5, 6, 7, 8]"


def test_wandb_is_given_each_point_with_its_step(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "forwarder.close()")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", code, "wandb:tests", "8"]
    subprocess.run(command, check=True, env=environment, timeout=100, capture_output=True)
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    assert b"loss/mean" in content
    assert RUN.replace(":", "-").encode() in content


@pytest.mark.parametrize("address", ["", "tensorboard", "tensorboard:", "mlflow:x", "wandb:../x", "trackio:a b"])
def test_what_it_cannot_log_to_it_refuses(address: str) -> None:
    with pytest.raises(InvalidField, match="tensorboard:DIRECTORY, trackio:PROJECT or wandb:PROJECT"):
        sinks.opened(address, RUN)
