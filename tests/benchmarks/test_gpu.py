"""`make bench-gpu`: the same phases on a CPU at tiny sizes, so that it starts at the first try where there is a GPU."""

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import wheels
from benchmarks.gpu.rig import randomize
from benchmarks.gpu.sizes import SIZES, write_model
from benchmarks.gpu.work import peak_of, training_flops
from benchmarks.page import GPU
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.loader import load

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_every_phase_finds_its_figures_and_the_page_is_made_of_them(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--dtype", "float32", "--sizes", "tiny", "--budget-s", "280", "--out", str(out)]
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    stored = json.loads(out.read_text())
    assert stored["failed"] == {}
    assert set(stored["phases_s"]) == {phase for group in bench.GROUPS for phase in group}
    names = {figure["name"] for figure in stored["figures"]}
    assert {
        "decode: 4 texts, 2 adapters",
        "an optimizer step, durable",
        "sampler : trainer, mean difference (k1)",
    } <= names
    beside = [figure for figure in stored["figures"] if figure["section"] == "training" and figure["bare"]]
    assert len(beside) == 2, "the bare loop's figures stand beside ours"
    page = GPU.written(GPU.page.read_text(encoding="utf-8"), stored)
    assert "### Kernels against their references" in page
    assert "| an optimizer step, durable |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--sizes", "tiny", "--out", str(tmp_path / "gpu.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("no figures: KNAPPER_DEVICE is 'cuda'; allowed: auto, cpu")


def _worker(code: str) -> bench.Worker:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=bench._forward, args=(process.stdout, lines), daemon=True).start()
    return bench.Worker(process, lines)


BEGUN = 'import sys, time\nprint(\'@{"begun": "packed"}\', flush=True)\n'


@pytest.mark.parametrize(
    ("code", "reason"),
    [("sys.exit(9)", "its process ended (exit status 9)"), ("time.sleep(60)", "longer than its limit")],
)
def test_a_phase_that_dies_or_hangs_has_failed_and_what_it_found_stays(tmp_path: Path, code: str, reason: str) -> None:
    figure = {"section": "s", "name": "n", "ours": 1, "unit": "", "goal": "", "note": ""}
    found = f"print({'@' + json.dumps({'figure': figure})!r}, flush=True)\n"
    results = bench.Results(tmp_path / "gpu.json", {})
    worker = _worker(BEGUN + found + code)
    for report in worker.reports({"packed": 2.0}, time.monotonic() + 100):
        results.take(report, 0.0)
    assert reason in results.failed["packed"]
    assert json.loads(results.path.read_text())["figures"][0]["ours"] == 1
    assert worker.process.poll() is not None


class _Drawn(TorchDispatchMode):
    """Counts the numbers that were drawn."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.normal_.default:
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_every_weight_of_a_true_size_is_drawn_on_the_device(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "m", SIZES["tiny"].model, stored=False), torch.bfloat16, "meta")
    assert isinstance(model, Decoder)
    drawn = _Drawn()  # type: ignore[no-untyped-call]  # the library has no types here
    with drawn:
        randomize(model)
    assert 2 * drawn.numbers == model.weights_bytes


def test_a_token_of_an_8b_model_costs_what_its_parameters_say(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES["qwen3-8b"].model))
    config = ModelConfig.read(tmp_path)
    parameters = sum(target.inputs * target.outputs for target in config.lora_targets)
    assert parameters == pytest.approx(7.57e9, rel=0.01)
    each = training_flops(config, [512] * 8, 32) / 4096
    assert 4 * parameters < each < 4.5 * parameters
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989.0


def test_the_packages_that_travel_are_those_that_the_tests_ran_with() -> None:
    assert all("==" in requirement for requirement in wheels.versions())
