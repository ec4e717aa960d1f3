"""One thread of an engine computes, on its share of threads: no other thread starts a team of OpenMP's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import knapper
from tests.engine.tiny import tiny_model

_CODE = """
import json, os, torch
from knapper.serving.engine import engine

def products():
    yield from ()
    return torch.get_num_threads(), float((torch.ones(512, 512) @ torch.ones(512, 512)).sum())

def tasks():
    return len(os.listdir("/proc/self/task"))

device = engine().sampler._scheduler._device
threads = device.submit(products()).result()[0]
before = tasks()
for _ in products():
    pass
print(json.dumps({"device": threads, "others": torch.get_num_threads(), "tasks": tasks(), "more": tasks() - before}))
"""


def _told(directory: Path, threads: int) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("KNAPPER_", "OMP_"))}
    settings = {"KNAPPER_MODEL_DIRECTORY": str(directory / "model"), "KNAPPER_DATA": str(directory / "data")}
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        env={**environment, **settings, "KNAPPER_THREADS": str(threads), "KNAPPER_DTYPE": "auto"},  # which computes too
        cwd=Path(knapper.__file__).parent.parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    output: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return output


@pytest.mark.skipif(sys.platform != "linux", reason="counts a process's threads in /proc")
def test_only_the_devices_thread_has_others_that_compute_with_it(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    alone, helped = _told(tmp_path, 1), _told(tmp_path, 3)
    assert (alone["device"], helped["device"]) == (1, 3)
    assert (alone["others"], helped["others"]) == (1, 1)
    assert (alone["more"], helped["more"]) == (0, 0)
    # One team, and as many again of a pool that torch makes when it is told a number, and that does nothing here.
    assert helped["tasks"] - alone["tasks"] == 2 * 2
