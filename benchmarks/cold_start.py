"""A pod of train_step from nothing to its first step, in turns with the bare loop's own cold start.

    python -m benchmarks.cold_start [--times N] [--dtype float32 bfloat16] [--beside CHECKOUT]

Written to out/cold_start.json; `make bench-page` makes the table of docs/performance.md of it. The process is started
as its container starts it, on as many threads as there are cores; the run and its forward_backward of 128 tokens lie in
the store already, and the doorbell rings as soon as the port answers. The files are in the page cache, and the modules
are compiled, as an image has them. "First on this CPU": over an empty store, which holds nothing yet of what is found
out about a CPU once. --beside: a checkout of another version, in turns too.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from benchmarks import figures
from benchmarks.figures import Figure
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.cluster.state import PROCESS_STAGES, process_stages
from knapper.events.cloudevents import Hint
from knapper.settings import Settings
from knapper.state.journal.accept import pack
from knapper.store.directory import DirectoryStore
from tests.gateway.pods import Pod, Two, committed
from tests.gateway.running import fwdbwd

TOKENS = 128
SECTION = "cold start"
ROOT = Path(__file__).parent.parent
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


def pod_s(
    model: Path, dtype: str, threads: int, directory: Path, root: Path | None = None
) -> tuple[float, dict[str, float]]:
    """Until the first answered forward_backward; and its stages, as the pod's own metrics have them."""
    settings = {"KNAPPER_DTYPE": dtype, "KNAPPER_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    settings["PYTHONDONTWRITEBYTECODE"] = ""
    pod = Pod("pod", directory, routed=True, model=model, root=root or ROOT, **settings)
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
            return took_s, process_stages((await client.get(f"{pod.address}/metrics")).text)

    try:
        return asyncio.run(first_step())
    finally:
        pod.stop()


def measure(model: Path, times: int, dtype: str, beside: Path | None = None) -> Iterator[Figure]:
    """Figures of one dtype: ours and the bare loop's, the stages, and another version's."""
    threads = os.cpu_count() or 1
    ours: list[tuple[float, dict[str, float]]] = []
    bare: list[float] = []
    before: list[float] = []
    with TemporaryDirectory(prefix="knapper-cold-") as own, TemporaryDirectory(prefix="knapper-cold-") as other:
        first_s, _ = pod_s(model, dtype, threads, Path(own))
        first_before_s = pod_s(model, dtype, threads, Path(other), beside)[0] if beside else None
        for _ in range(times):
            bare.append(bare_s(model, dtype, threads))
            ours.append(pod_s(model, dtype, threads, Path(own)))
            if beside is not None:
                before.append(pod_s(model, dtype, threads, Path(other), beside)[0])
    took = [took_s for took_s, _ in ours]
    yield Figure(
        SECTION, f"{dtype}: from the process's start to the first step", median(took), median(bare), "s",
        median(bare) / median(took), "<= 4 s", "2.5 s", spread(took),
        f"{least_to_most(took)}; bare {least_to_most(bare)}",
    )  # fmt: skip
    yield Figure(SECTION, f"{dtype}: the first on this CPU", first_s, None, "s")
    if before and first_before_s is not None:
        note = f"{least_to_most(before)}; the first on this CPU {first_before_s:.1f} s"
        yield Figure(
            SECTION, f"{dtype}: the version before", median(before), None, "s", spread=spread(before), note=note
        )
    for stage in PROCESS_STAGES:
        yield Figure(SECTION, f"{dtype}: of it {stage}", median(each[stage] for _, each in ours), None, "s")


def spread(seconds: Sequence[float]) -> float:
    return (max(seconds) - min(seconds)) / 2 / median(seconds)


def least_to_most(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="of each, in turns")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    args = parser.parse_args()
    directory = Path(obtain(SMOLLM2, Settings.load(os.environ).cache))
    machine, began = figures.machine(), time.monotonic()
    found: list[Figure] = []
    for dtype in args.dtype:
        for figure in measure(directory, args.times, dtype, args.beside and args.beside.resolve()):
            found.append(figure)
            print(figure.line(), flush=True)
    header = {"machine": machine, "load_1min_after": os.getloadavg()[0], "took_s": round(time.monotonic() - began)}
    figures.store(found, Path("out/cold_start.json"), model=SMOLLM2, quick=args.times < 5, failed={}, **header)


if __name__ == "__main__":
    main()
