"""How long a page of the console takes in a store of many runs: `python -m benchmarks.console --runs 10000`.

The store is a directory of finished sessions with a run and a sampler each, and as many jobs. What is
measured is the processor time of the whole gateway for a page, which other work on the machine does not lengthen.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from gateway.app import create_app
from knapper.ids import LOCAL_TENANT, RunId, session_of
from knapper.settings import Settings
from knapper.state.layout import ObjectKind
from knapper.store.directory import DirectoryStore
from knapper.store.memory import MemoryStore
from tests.gateway.finished import lay_jobs, lay_runs, run_of

_REPEATS = 11
_WHOLE = 60  # runs, and jobs: more than two pages
_YEAR_S = 365 * 86400.0  # over which all of them are spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        runs = asyncio.run(_lay(Path(place) / "store", count))
        print(f"{count} runs and {count} jobs, laid in {time.monotonic() - began:.0f} s", flush=True)
        asyncio.run(_measure(Path(place) / "store", _pages(runs)))


def _pages(runs: list[RunId]) -> list[str]:
    middle, last = f"{int((time.time() - _YEAR_S / 2) * 1e6)}-0", runs[-1]
    return [
        "/", f"/?before={middle}", "/jobs", f"/jobs?before={middle}", "/sessions", f"/sessions?before={middle}",
        "/checkpoints", f"/checkpoints?before={middle}", f"/runs/{last}", f"/runs/{last}/operations",
        f"/runs/{last}/curve", f"/sessions/{session_of(last)}", "/jobs/job-7/curve", "/playground", "/usage",
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
    """A session with a run and a sampler, and a job, as their lists have them."""
    us, run = int(at * 1e6), run_of(n, "names")
    session, start = session_of(run), f"{n:016x}"
    for key in (
        ObjectKind.TENANT_SESSION.key(LOCAL_TENANT, us, session),
        ObjectKind.TENANT_RUN.key(LOCAL_TENANT, us, session, 0),
        ObjectKind.SAMPLER.key(f"{session}:sample:0"), ObjectKind.OPERATION.key(f"{n:08x}-{run}", 0),
        ObjectKind.TENANT_JOB.key(LOCAL_TENANT, us, f"names-{n}", start),
        ObjectKind.TENANT_START.key(LOCAL_TENANT, f"names-{n}", us, start),
    ):  # fmt: skip
        await store.put_if_absent(key, b"")


def _clock(now: float, calls: int) -> Callable[[], float]:
    """Half of what is laid whole, at so many calls each, is of the middle of the year, and the rest of its end."""
    ticks = itertools.count()
    first = calls * _WHOLE
    return lambda: now - 3600.0 + tick if (tick := next(ticks)) > first else now - _YEAR_S / 2 - first + tick


async def _measure(store: Path, pages: list[str]) -> None:
    app = create_app(DirectoryStore(store), Settings.load({"KNAPPER_TRAIN_STEP_URL": "http://127.0.0.1:9"}))
    transport, html = httpx.ASGITransport(app, client=("127.0.0.1", 1)), {"Accept": "text/html"}
    print(f"{'page':<70}{'first':>10}{'then':>10}{'bytes':>10}")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=html) as http,
    ):
        for page in pages:
            spent, size = [], 0
            for _ in range(_REPEATS):
                began = time.process_time()
                answer = (await http.get(page)).raise_for_status()
                spent.append(1e3 * (time.process_time() - began))
                size = len(answer.content)
            name = page.partition("?")[0] + (" in the middle" if "?" in page else "")
            then = statistics.median(spent[1:])
            print(f"{name:<70}{spent[0]:>7.0f} ms{then:>7.0f} ms{size:>10}", flush=True)


if __name__ == "__main__":
    main()
