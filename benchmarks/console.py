"""How long a page of the console takes in a store of many runs: `python -m benchmarks.console --runs 10000`.

The store is a directory of finished sessions with a run, a checkpoint and a sampler each, and as many jobs, as the real
components store them. The gateway is a process of its own; each page is loaded once by one that has just started, and
then again and again.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from knapper.ids import RunId, session_of
from knapper.state.layout import ObjectKind
from knapper.store.memory import MemoryStore
from tests.conformance.server import wait_until
from tests.gateway.finished import lay_jobs, lay_runs

_REPEATS = 10
_YEAR_S = 365 * 86400.0  # over which all of them are spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        runs = asyncio.run(_lay(Path(place) / "data" / "store", count))
        print(f"{count} runs and {count} jobs, laid in {time.monotonic() - began:.0f} s", flush=True)
        _measure(Path(place) / "data", _pages(runs))


def _pages(runs: list[RunId]) -> list[str]:
    middle, last = f"{int((time.time() - _YEAR_S / 2) * 1e6)}-0", runs[-1]
    return [
        "/", f"/?before={middle}", "/jobs", f"/jobs?before={middle}", "/sessions", f"/sessions?before={middle}",
        "/checkpoints", f"/checkpoints?before={middle}", f"/runs/{last}", f"/runs/{last}/operations",
        f"/runs/{last}/curve", f"/sessions/{session_of(last)}", "/jobs/job-7/curve", "/playground", "/usage",
        "/usage/stored",
    ]  # fmt: skip


async def _lay(root: Path, count: int) -> list[RunId]:
    """By the real components into memory, and from there into files, without syncing each."""
    memory = MemoryStore()
    runs = await lay_runs(memory, _spread(count, 20), count)
    await lay_jobs(memory, _spread(count, 3), count)
    for done in (ObjectKind.LEDGER_BEGAN, ObjectKind.COLLECT_BEGUN):  # else the gateway brings an old store up to date
        await memory.put_if_absent(done.key(), b"")
    for name in await memory.list(""):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(await memory.get(name) or b"")
    return runs


def _spread(count: int, calls: int) -> Callable[[], float]:
    """A clock that goes on by as much at each call that all of them are within the last year."""
    began, ticks = time.time() - _YEAR_S, itertools.count()
    return lambda: min(began + next(ticks) * _YEAR_S / (count * calls), time.time())


def _measure(data: Path, pages: list[str]) -> None:
    address = {"KNAPPER_DATA": str(data), "KNAPPER_TRAIN_STEP_URL": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "uvicorn", "gateway.app:app", "--port", "8765", "--log-level", "warning"]
    print(f"{'page':<60}{'first':>10}{'median':>10}{'slowest':>10}{'bytes':>10}")
    for page in pages:
        with subprocess.Popen(command, env={**os.environ, **address}, stderr=subprocess.DEVNULL) as gateway:
            with httpx.Client(base_url="http://127.0.0.1:8765", headers={"Accept": "text/html"}) as http:
                wait_until(lambda http=http: _answers(http), "the gateway answers", 60.0)  # type: ignore[misc]
                times = [_timed(http, page) for _ in range(_REPEATS + 1)]
            gateway.terminate()
        first, *others = (each for each, _ in times)
        told = "".join(f"{1e3 * each:>7.1f} ms" for each in (first, statistics.median(others), max(others)))
        name = page.partition("?")[0] + (" in the middle" if "?" in page else "")
        print(f"{name[:58]:<60}{told}{times[0][1]:>10}", flush=True)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/api/v1/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _timed(http: httpx.Client, page: str) -> tuple[float, int]:
    began = time.perf_counter()
    answer = http.get(page)
    took = time.perf_counter() - began
    return took, len(answer.raise_for_status().content)


if __name__ == "__main__":
    main()
