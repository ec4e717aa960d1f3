"""A pod of train_step from nothing to its first step, in turns with the bare loop's own cold start.

    python -m benchmarks.cold_start [--times N] [--dtype float32 bfloat16]

The process is started as its container starts it, on as many threads as there are cores; the run and its
forward_backward of 128 tokens lie in the store already, and the doorbell rings as soon as the port answers. The files
are in the page cache. "First on this CPU": over an empty store, which holds nothing yet of what is found out about a
CPU once.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx

from benchmarks.figures import Figure
from knapper.events.cloudevents import Hint
from knapper.state.journal.accept import pack
from knapper.store.directory import DirectoryStore
from tests.gateway.pods import Pod, Two, committed
from tests.gateway.running import fwdbwd

TOKENS = 128
STAGES = ("import", "weights", "ready", "adapter", "first_step")
_BARE = (
    "import sys; from pathlib import Path; import torch; from benchmarks.bare import Bare; "
    "from benchmarks.train_steps import texts; torch.set_num_threads(int(sys.argv[3])); "
    f"Bare(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2])).step(texts([{TOKENS}]), [[1.0] * {TOKENS}])"
)


def bare_s(model: Path, dtype: str, threads: int) -> float:
    """Import torch, transformers and peft, load, one step."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", _BARE, str(model), dtype, str(threads)], check=True, capture_output=True)
    return time.perf_counter() - began


def pod_s(model: Path, dtype: str, threads: int, directory: Path) -> tuple[float, dict[str, float]]:
    """Until the first answered forward_backward; and its stages, as the pod's own metrics have them."""
    settings = {"KNAPPER_DTYPE": dtype, "KNAPPER_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    pod = Pod("pod", directory, routed=True, model=model, **settings)
    pods = Two(DirectoryStore(pod.data / "store"), pod.data, pod, pod)

    async def first_step() -> tuple[float, dict[str, float]]:
        run = await pods.make(f"cold-{time.time_ns()}")
        await pods.acceptor.accept(run, 1, "forward_backward", pack(fwdbwd(run, 1, TOKENS)))
        began = time.perf_counter()
        pod.start()
        pod.wait()
        _, said, frames = await pod.ring(run, Hint())
        took_s = time.perf_counter() - began
        assert committed(frames) == [0, 1], said
        async with httpx.AsyncClient(trust_env=False) as client:
            return took_s, stages((await client.get(f"{pod.address}/metrics")).text)

    try:
        return asyncio.run(first_step())
    finally:
        pod.stop()


def stages(page: str) -> dict[str, float]:
    """Seconds of each stage of a start, from a page of metrics."""
    found = re.findall(r'^knapper_cold_start_seconds_sum\{stage="(\w+)"\} ([\d.e+-]+)$', page, flags=re.MULTILINE)
    return {stage: float(seconds) for stage, seconds in found}


def measure(model: Path, times: int, dtype: str = "float32") -> Iterator[Figure]:
    threads = os.cpu_count() or 1
    ours: list[tuple[float, dict[str, float]]] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="knapper-cold-") as scratch:
        first_s, _ = pod_s(model, dtype, threads, Path(scratch))
        for _ in range(times):
            bare.append(bare_s(model, dtype, threads))
            ours.append(pod_s(model, dtype, threads, Path(scratch)))
    took = [took_s for took_s, _ in ours]
    yield Figure(
        "starting", f"pod-cold to the first step, {dtype}", median(took), median(bare), "s",
        median(bare) / median(took), "<= 4 s", "2.5 s", spread=(max(took) - min(took)) / 2 / median(took),
        note=f"{min(took):.2f} to {max(took):.2f} s; bare {min(bare):.2f} to {max(bare):.2f}",
    )  # fmt: skip
    yield Figure("starting", f"the same, the first on this CPU, {dtype}", first_s, None, "s")
    for stage in STAGES:
        if all(stage in each for _, each in ours):
            seconds = median(each[stage] for _, each in ours)
            yield Figure("starting", f"of it: {stage}, {dtype}", seconds, None, "s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="of each, in turns")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    args = parser.parse_args()
    from knapper.catalogue.download import SMOLLM2, obtain
    from knapper.settings import Settings

    model = Path(obtain(SMOLLM2, Settings.load(os.environ).cache))
    for dtype in args.dtype:
        for figure in measure(model, args.times, dtype):
            print(figure.line(), flush=True)


if __name__ == "__main__":
    main()
