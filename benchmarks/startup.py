"""From nothing to the first answered operation, by stage; and the memory of a step."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figures import Figure, seconds
from benchmarks.served import Setting, datum, serving, step
from benchmarks.train_steps import texts

_LOAD = (
    "import sys, time; from pathlib import Path; from knapper.engine.models import weights; "
    "from knapper.engine.models.config import ModelConfig; d = Path(sys.argv[1]); began = time.perf_counter(); "
    "c = ModelConfig.read(d); weights.load(d, c); print(time.perf_counter() - began)"
)


def measure(setting: Setting) -> list[Figure]:
    times = 1 if setting.quick else 3
    interpreter_s = _python_s("pass", times)
    imports_s = _python_s("import knapper.serving.engine", times) - interpreter_s
    bare_code = "import torch, transformers, peft; transformers.AutoModelForCausalLM; peft.LoraConfig"
    bare_imports_s = _python_s(bare_code, times)
    loading = subprocess.run(
        [sys.executable, "-c", _LOAD, str(setting.directory)], capture_output=True, text=True, check=True
    )
    return [
        Figure("starting", "interpreter", interpreter_s, None, "s"),
        Figure(
            "starting", "imports of the engine, against torch, transformers and peft", imports_s,
            bare_imports_s - interpreter_s, "s", (bare_imports_s - interpreter_s) / imports_s,
        ),
        Figure("starting", "weights", float(loading.stdout), None, "s"),
        *_first_operation(setting),
    ]  # fmt: skip


def _python_s(code: str, times: int) -> float:
    run = [sys.executable, "-c", code]
    return min(seconds(lambda: subprocess.run(run, check=True)) for _ in range(times))


def _first_operation(setting: Setting) -> list[Figure]:
    """The first operation of an engine at zero; then its peak memory after a large step."""
    rows = 1 if setting.quick else 16
    data = texts([128] * rows)
    sent = [datum(text, [1.0] * len(text)) for text in data]
    with serving(setting.directory, "", "", quick=setting.quick, threads=setting.threads) as fresh:
        client = fresh.service.create_lora_training_client(fresh.model, rank=16, train_unembed=False)
        began = time.perf_counter()
        client.result().forward_backward([sent[0]], "cross_entropy").result()
        whole_s = time.perf_counter() - began
        step(client.result(), sent)
        assert fresh.server is not None
        peak = _peak_mib(Path(f"/proc/{fresh.server.processes()['engine']}/status").read_text())
    first = "the first forward_backward of an engine at zero"
    figures = [Figure("starting", first, whole_s, None, "s", None, "<= 4 s", "2.5 s")]
    if setting.quick:  # a small step's memory is the process's
        return figures
    bare = float(_bare_peak(setting.directory, rows))
    return [
        *figures,
        Figure(
            "starting", f"peak memory of the process, a step of {rows} x 128 tokens", peak, bare, "MiB", bare / peak,
            ">= 2x (half of it)", "3.3x",
        ),
    ]  # fmt: skip


def _peak_mib(status: str) -> float:
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _bare_peak(directory: Path, rows: int) -> str:
    code = (
        "import sys; from pathlib import Path; "
        "from benchmarks.bare import Bare; from benchmarks.train_steps import texts; "
        f"data = texts([128] * {rows}); Bare(Path(sys.argv[1])).step(data, [[1.0] * 128] * {rows}); "
        "print(int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) / 1024)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    return ran.stdout.strip().splitlines()[-1]
