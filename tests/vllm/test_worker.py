"""vLLM's processes end with their server, whether a core computes by itself or in a worker, and however early."""

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess

import pytest

from knapper.vllm.core import SERVER
from tests.conformance.server import running, wait_until

_spawned = multiprocessing.get_context("spawn")


def started(what: str, *rest: str) -> BaseProcess:
    process = _spawned.Process(target=live, args=(what, *rest))
    process.start()
    return process


def live(what: str, *rest: str) -> None:
    """As vLLM's processes do: a core starts its worker, if it has one, and what computes looks `worker` up by name."""
    print(os.getpid(), flush=True)
    if what == "orphan":  # its server ends before the module is looked up
        os.kill(int(os.environ[SERVER]), 9)
        wait_until(lambda: os.getppid() != int(os.environ[SERVER]), "the server has ended")
    if rest:
        started(*rest)
    else:
        import knapper.vllm.worker

        print("ready", knapper.vllm.worker.__name__, flush=True)
    time.sleep(600)


def serve(*processes: str) -> None:
    os.environ[SERVER] = str(os.getpid())
    started(*processes)
    time.sleep(600)


@pytest.mark.parametrize("processes", [["core"], ["core", "worker"], ["orphan"], ["orphan", "worker"]], ids=" ".join)
def test_a_killed_server_takes_its_core_with_it(processes: list[str]) -> None:
    code = f"from tests.vllm.test_worker import serve; serve(*{processes})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(server.stdout.readline()) for _ in processes]
        if "orphan" not in processes:
            assert server.stdout.readline().startswith("ready")
            assert all(map(running, pids))
            server.kill()
        wait_until(lambda: not any(map(running, pids)), "they have ended")
