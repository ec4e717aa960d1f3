"""The account of memory of an engine that runs: at its start, in /metrics, and by `knapper doctor`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

pytestmark = pytest.mark.timeout(240)


def test_the_start_and_the_doctor_tell_the_account(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "models" / "tiny")
    with Server.start(model, tmp_path / "data") as server:
        with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
            sampling = service.create_sampling_client(base_model=str(model)).result()
            prompt = types.ModelInput.from_ints([1, 2, 3])
            sampling.sample(prompt, 1, types.SamplingParams(max_tokens=2)).result()
        command = [sys.executable, "-m", "knapper", "doctor", "--all", "--data", str(server.data)]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.returncode == 0, told.stdout + told.stderr
        line = next(line for line in told.stdout.splitlines() if "memory of engine" in line)
        parts = re.findall(r"(\w+) [\d.]+ (?:[KMG]iB|bytes)", line)
        assert parts == ["weights", "kv", "adapters", "activations", "runs"]
        assert server.log().count("1,024 rows a pass") == 1, "the start tells it once"
