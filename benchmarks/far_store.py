"""Steps of a run whose store is far away: 80 ms a write, 30 ms a read, as a bucket in another region has them.

    python -m benchmarks.far_store [--times N] [--beside CHECKOUT]

Written to out/far_store.json; `make bench-page` makes the table of docs/performance.md of it. The journal is the real
one, over a store in memory that pauses. Ten steps wait in it, each a pass and an optimizer step, and the time is that
until the last result is durable, a step. "Bare" is the compute alone, which is a pause here too. --beside: a checkout
of another version, in turns.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import figures
from benchmarks.figures import Figure
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Commit, Operation
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS
from tests.sim.ledger import SIZE, LedgerMachine, LedgerState

WRITE_S, READ_S = 0.08, 0.03
STEPS = 10
COMPUTE_MS = (2, 50, 100, 200, 400)
_PASS = 0.9  # of a step's compute
_COST_S = 0.001  # of an operation in a replay, so that no snapshot falls into the time


class Far(MemoryStore):
    async def put_if_absent(self, name: str, data: bytes) -> bool:
        await asyncio.sleep(WRITE_S)
        return await super().put_if_absent(name, data)

    async def get(self, name: str) -> bytes | None:
        await asyncio.sleep(READ_S)
        return await super().get(name)


class Slow(LedgerMachine):
    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
        part = _PASS if operation.kind == "forward_backward" else 1 - _PASS
        await asyncio.sleep(part * self._step_s)
        outcome = await super().apply(state, operation, source)
        return Outcome(outcome.state, outcome.content_type, outcome.body, _COST_S)


async def step_s(compute_s: float) -> float:
    """Seconds a step."""
    store = Far()
    acceptor = Acceptor(store, time.time)
    await acceptor.create(CREATION, b"create")
    run = await Run.claim(store, RUN, Slow(compute_s), Holder("h", "", TERMS), time.time)
    await _applied(run)
    row = pack(np.ones(SIZE, np.float32).tobytes())
    passes = [acceptor.accept(RUN, 2 * n + 1, "forward_backward", row) for n in range(STEPS)]
    await asyncio.gather(*passes, *(acceptor.accept(RUN, 2 * n + 2, "optim_step", pack(b"{}")) for n in range(STEPS)))
    began = time.perf_counter()
    await _applied(run)
    return (time.perf_counter() - began) / STEPS


async def _applied(run: Run[LedgerState]) -> None:
    async def publish(_n: int, _commit: Commit) -> None:
        return None

    assert not await run.apply_pending(lambda: False, publish), "a snapshot fell into the time"


def measure(times: int, beside: Path | None) -> Iterator[Figure]:
    for compute_ms in COMPUTE_MS:
        ours, before = list[float](), list[float]()
        for _ in range(times):
            ours.append(1000 * asyncio.run(step_s(compute_ms / 1000)))
            if beside is not None:
                before.append(_of(beside, compute_ms))
        note = f"the version before: {median(before):.0f} ms" if before else ""
        spread = (max(ours) - min(ours)) / 2 / median(ours)
        goal = f"<= {max(compute_ms, 100)} ms"
        yield Figure(
            "far store", f"a step with {compute_ms} ms of compute", median(ours), compute_ms, "ms", None, goal,
            spread=spread, note=note,
        )  # fmt: skip


def _of(checkout: Path, compute_ms: int) -> float:
    """Of another version, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-P", __file__, "--one", str(compute_ms)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=checkout)
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.far_store", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="of each, in turns")
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(1000 * asyncio.run(step_s(args.one / 1000))))
        return
    machine, began = figures.machine(), time.monotonic()
    found: list[Figure] = []
    for figure in measure(args.times, args.beside and args.beside.resolve()):
        found.append(figure)
        print(figure.line(), flush=True)
    header = {"machine": machine, "load_1min_after": os.getloadavg()[0], "took_s": round(time.monotonic() - began)}
    figures.store(found, Path("out/far_store.json"), model="none", quick=args.times < 5, failed={}, **header)


if __name__ == "__main__":
    main()
