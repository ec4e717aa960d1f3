"""How long a page of the console takes in a store of many runs: `python -m benchmarks.console --runs 10000`.

The store is a directory of finished sessions with a run, a checkpoint and a sampler each, and as many jobs. The gateway
is a process of its own; each page is loaded once by one that has just started, and then again and again.
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

from knapper.ids import LOCAL_TENANT, RunId, session_of
from knapper.state.layout import ObjectKind
from knapper.store.memory import MemoryStore
from tests.conformance.server import wait_until
from tests.gateway.finished import lay_jobs, lay_runs, run_of

_REPEATS = 10
_WHOLE = 60  # runs, and jobs: more than two pages
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
    """Some at the end and in the middle whole, by the real components; of the others what lists read, their names.

    All of it in memory first, and from there in files, without syncing each.
    """
    memory, now = MemoryStore(), time.time()
    for n in range(count):
        await _names(memory, n, now - _YEAR_S * (count - n) / count)
    whole = await lay_runs(memory, _clock(now, 18), 2 * _WHOLE)
    await lay_jobs(memory, _clock(now, 3), 2 * _WHOLE)
    for done in (ObjectKind.LEDGER_BEGAN, ObjectKind.COLLECT_BEGUN):  # else the gateway brings an old store up to date
        await memory.put_if_absent(done.key(), b"")
    for name in await memory.list(""):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(await memory.get(name) or b"")
    return whole


async def _names(store: MemoryStore, n: int, at: float) -> None:
    """A session with a run, a checkpoint and a sampler, and a job, as their lists have them."""
    us, run = int(at * 1e6), run_of(n, "names")
    session, start = session_of(run), f"{n:016x}"
    for key in (
        ObjectKind.TENANT_SESSION.key(LOCAL_TENANT, us, session),
        ObjectKind.TENANT_RUN.key(LOCAL_TENANT, us, session, 0),
        ObjectKind.SAMPLER.key(f"{session}:sample:0"), ObjectKind.OPERATION.key(f"{n:08x}-{run}", 0),
        ObjectKind.CHECKPOINT.key(LOCAL_TENANT, run, "sampler_weights", "end", 1),
        ObjectKind.TENANT_JOB.key(LOCAL_TENANT, us, f"names-{n}", start),
        ObjectKind.TENANT_START.key(LOCAL_TENANT, f"names-{n}", us, start),
    ):  # fmt: skip
        await store.put_if_absent(key, b"")


def _clock(now: float, calls: int) -> Callable[[], float]:
    """Half of what is laid whole, at so many calls each, is of the middle of the year, and the rest of its end."""
    ticks = itertools.count()
    first = calls * _WHOLE
    return lambda: now - 3600.0 + tick if (tick := next(ticks)) > first else now - _YEAR_S / 2 - first + tick


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
