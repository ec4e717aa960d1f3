"""kill -9 of each process in turn, under a client that has no except in it: it ends with the same weights, bit for bit.

Replay one:  KILL_SEED=7 python -m pytest tests/conformance/test_kills.py
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from tests.conformance.server import Server, wait_until
from tests.store.emulator import Emulator

SEED = int(os.environ.get("KILL_SEED", "1"))
ISOLATED = ("train_step", "gateway", "sample", "supervisor")
SHARED = ("engine", "gateway", "engine", "supervisor")


def client(server: Server, model: Path, steps: int, store: str = "") -> Iterator[str]:
    """The lines that the client prints, as it prints them."""
    command = [sys.executable, "-m", "tests.conformance.kill_client", server.url, str(model), store or str(server.data)]
    process = subprocess.Popen([*command, str(steps)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for line in process.stdout:
            yield line.strip()
        complaints = process.stderr.read()
        assert process.wait() == 0, complaints[-3000:] + server.log()[-6000:]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


Calm = Callable[[int], str]


@pytest.fixture(scope="module")
def calm(server: Server, model: Path) -> Calm:
    """What so many steps end with where nothing is killed: on one engine, over a directory."""
    return cache(lambda steps: list(client(server, model, steps))[-1])


def kill_often(
    tmp_path: Path, model: Path, calm: Calm, kills: int, steps: int, processes: tuple[str, ...], *flags: str,
    bucket: str = "",
) -> None:  # fmt: skip
    """Run the loop with `kills` kills spread over it, in a directory or in the `bucket`, and compare all that came out
    with what the undisturbed one gave."""
    draw = random.Random(SEED)
    roles = [processes[n % len(processes)] for n in range(kills)]
    due = sorted(draw.sample(range(1, steps), kills))
    killed: list[str] = []
    with Server.start(model, tmp_path / "wild", *flags, settings={"KNAPPER_STORE": bucket}) as server:
        last = ""
        for line in client(server, model, steps, bucket):
            last = line
            while due and line == f"step {due[0] - 1}":
                due.pop(0)
                time.sleep(draw.random() * 0.3)  # anywhere in the next step
                killed.append(kill(server, roles[len(killed)]))
        print(f"\nseed {SEED}: killed {killed}")
        assert len(killed) == kills
        assert last == calm(steps), f"seed {SEED}: {last!r}; undisturbed {calm(steps)!r}"


def kill(server: Server, role: str) -> str:
    """Kill -9 it, as soon as it lives. The supervisor is brought up again, as an operator would."""
    with suppress(AssertionError):
        wait_until(lambda: role in server.processes(), f"{role} lives", timeout_s=10.0)
    if role not in server.processes():  # asleep, and the client does not need it now
        role = "gateway"
    try:
        server.kill(role)
    except ProcessLookupError:  # it fell asleep after it was looked up; the gateway never sleeps
        role = "gateway"
        server.kill(role)
    if role == "supervisor":
        server.up()
    return role


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("kills", "steps"), [(4, 6), pytest.param(20, 24, marks=pytest.mark.long)])
def test_kills_of_every_process_change_not_one_bit(
    tmp_path: Path, model: Path, calm: Calm, kills: int, steps: int
) -> None:
    """Each of the four, or each five times."""
    kill_often(tmp_path, model, calm, kills, steps, ISOLATED, "--isolated")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kills", "steps"), [(4, 6), pytest.param(100, 110, marks=pytest.mark.long)])
def test_kills_over_a_bucket_give_what_a_directory_gives(
    tmp_path: Path, model: Path, calm: Calm, gcs: Emulator, monkeypatch: pytest.MonkeyPatch, kills: int, steps: int
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    kill_often(tmp_path, model, calm, kills, steps, SHARED, bucket=f"gs://{gcs.make_bucket()}/kills")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_kills_with_one_shared_engine_change_not_one_bit(tmp_path: Path, model: Path, calm: Calm) -> None:
    kill_often(tmp_path, model, calm, 100, 110, SHARED)
