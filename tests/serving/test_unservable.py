"""A function whose model cannot be loaded, as a pod runs it: it stays up, answers with the reason, and comes back."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from knapper import ids
from knapper.concurrency.retry import Attempts, Deaths
from knapper.events import cloudevents
from knapper.events.cloudevents import Hint
from knapper.events.function_key import FunctionKey
from knapper.store.directory import DirectoryStore
from tests.engine.tiny import tiny_model
from tests.local.broken import REFUSED, copied, cut

ROOT = Path(__file__).parents[2]


@contextmanager
def pod(name: str, model: Path, data: Path, **settings: str) -> Iterator["Pod"]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KNAPPER_")} | {
        "KNAPPER_DATA": str(data), "KNAPPER_MODEL": "org/name", "KNAPPER_MODEL_DIRECTORY": str(model),
        "KNAPPER_DTYPE": "float32", "KNAPPER_THREADS": "1", "FUNCTION_TARGET": name,
        "FUNCTION_SOURCE": str(ROOT / "functions" / name / "main.py"), **settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "uvicorn", "functions_framework.aio:app", "--port", str(port), "--lifespan", "on"]
    log = data.with_suffix(".log")
    opening = asyncio.run(FunctionKey(DirectoryStore(data / "store"), lambda: secrets.token_hex(16)).headers())
    with (
        log.open("a") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=ROOT) as process,
    ):
        try:
            yield Pod(process, f"http://127.0.0.1:{port}/", log, opening)
        finally:
            process.send_signal(signal.SIGKILL)


class Pod:
    """`opening`: the headers that open it."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, log: Path, opening: dict[str, str]) -> None:
        self.process, self.url, self.log, self.opening = process, url, log, opening

    def ask(self) -> httpx.Response:
        """A doorbell for a run that does not exist: 404 once there is an engine."""
        end = time.monotonic() + 100
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.post(self.url, content=BODY, headers=HEADERS | self.opening, trust_env=False, timeout=60)
            except httpx.TransportError:
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.1)


HEADERS, BODY = cloudevents.bell(ids.run_id("ses-00000000000000000000000000000000:train:0"), "1", Hint()).encode()


def test_it_stays_up_with_the_reason_and_serves_once_the_files_are_mended(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    cut(1000)(model)
    with pod("train_step", model, tmp_path / "data") as one:
        for _ in range(3):
            answer = one.ask()
            assert (answer.status_code, answer.json()["code"]) == (503, "unservable")
            assert "model org/name cannot be served" in answer.json()["detail"]
            assert "it was cut: it has 1000 bytes" in answer.json()["detail"]
            assert 1 <= int(answer.headers["retry-after"]) <= 100
        (model / "model.safetensors").write_bytes(whole)
        while (answer := one.ask()).status_code == 503:
            time.sleep(0.2)
        assert answer.status_code == 404
        log = one.log.read_text()
    assert log.count("cannot be served") == 1
    assert "is served again" in log
    assert "Traceback" not in log


def test_an_architecture_that_is_refused_is_said_by_the_pod(tmp_path: Path) -> None:
    change, why = REFUSED["an architecture that nobody knows"]
    model = copied(tiny_model(tmp_path / "model"), tmp_path / "wild", change)
    with pod("train_step", model, tmp_path / "data") as one:
        answer = one.ask()
        assert answer.status_code == 503
        assert why in answer.json()["detail"]
        assert "Traceback" not in one.log.read_text()


def test_a_container_that_was_killed_twice_while_it_loaded_stands_and_says_so(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    deaths = Deaths(tmp_path / "data" / "run" / "loading-engine-train_step")
    for _ in range(2):
        deaths.begin()
    with pod("train_step", model, tmp_path / "data") as one:
        answer = one.ask()
        assert answer.status_code == 503
        assert "its process was killed, time and again, while it loaded" in answer.json()["detail"]
        while (answer := one.ask()).status_code == 503:
            time.sleep(0.2)
        assert answer.status_code == 404
    assert deaths.count == 0


def test_pauses_double_up_to_half_a_minute_and_are_no_shorter_than_the_attempt() -> None:
    now = 0.0
    attempts = Attempts("model x", lambda: now)
    pauses = []
    for _ in range(7):
        attempts.failed("it has 7 bytes")
        pauses.append(attempts.refusal().retry_after_s)
        assert not attempts.due
        now += pauses[-1]
        assert attempts.due
    assert pauses == [2.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]  # clients wait at least two seconds
    attempts.failed("it has 8 bytes", took_s=90.0)
    assert attempts.refusal().retry_after_s == 90.0
    assert "it has 7 bytes" in str(attempts.refusal()), "the same sentence: another number is no news"
    attempts.failed("the disk is full")
    assert "the disk is full" in str(attempts.refusal())
    attempts.succeeded()
    assert attempts.reason == ""
    attempts.failed("it has 7 bytes")
    assert attempts.refusal().retry_after_s == 2.0


@pytest.mark.parametrize("content", ["", "x", "-1x"])
def test_a_file_that_counts_nothing_counts_no_deaths(tmp_path: Path, content: str) -> None:
    (tmp_path / "deaths").write_text(content)
    assert Deaths(tmp_path / "deaths").count == 0
    assert Deaths(tmp_path / "deaths" / "below a file").count == 0
    Deaths(tmp_path / "deaths" / "below a file").begin()
