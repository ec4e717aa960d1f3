"""A client's rollouts go through the gateway to the real reward function, whose response comes back unchanged."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import functions
from knapper import limits
from knapper.store.directory import DirectoryStore
from tests.gateway.running import Running, gateway

MAIN = Path(functions.__path__[0]) / "reward" / "main.py"
ROLLOUTS = [{"id": "a", "completion": "7", "answer": 7}, {"id": "b", "completion": "8", "answer": 7}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of the deployment."""
    return tmp_path_factory.mktemp("deployment") / "data"


@pytest.fixture(scope="module")
def function(data: Path) -> Iterator[str]:
    """As a cluster runs it: alone, under functions-framework. Without torch, which it must not need."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    no_torch = "import sys; sys.modules['torch'] = None; import uvicorn; uvicorn.main()"
    command = [sys.executable, "-c", no_torch, "functions_framework.aio:app", "--port", str(port), "--lifespan", "on"]
    environment = os.environ | {"FUNCTION_TARGET": "reward", "FUNCTION_SOURCE": str(MAIN), "KNAPPER_DATA": str(data)}
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
        process.terminate()


@pytest.fixture
def running(function: str, data: Path) -> Iterator[Running]:
    with gateway(DirectoryStore(data / "store"), model=None, reward_url=function) as running:
        yield running


def test_scores_come_back_in_order(running: Running) -> None:
    answer = running.post("rewards", {"reward": {"name": "numeric"}, "rollouts": ROLLOUTS})
    assert [(score["id"], score["value"]) for score in answer["scores"]] == [("a", 1.0), ("b", 0.0)]


def test_code_is_run_and_its_error_is_told_with_its_line(running: Running) -> None:
    body: dict[str, Any] = {"reward": {"code": "reward.py"}, "rollouts": ROLLOUTS}
    code = "def reward(prompt, completion, answer):\n    return 1 / (int(completion) - answer)\n"
    answer = running.post("rewards", {**body, "files": {"reward.py": code}}, status=422)
    assert answer == {
        "detail": "rollout a: ZeroDivisionError: division by zero "
        "(reward.py, line 2: return 1 / (int(completion) - answer))",
        "code": "reward_failed",
        "category": "user",
    }


def test_what_is_wrong_is_named(running: Running) -> None:
    answer = running.post("rewards", {"reward": {"name": "exact"}, "rollouts": ROLLOUTS}, status=422)
    assert answer["detail"].startswith("reward.name is 'exact'; allowed: exact_match, regex")
    assert answer["code"] == "invalid_field"


def test_a_body_over_the_limit_is_refused_by_the_gateway(running: Running) -> None:
    reply = running.http.post("rewards", content=b" " * (limits.body_bytes_max + 1))
    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")


def test_without_a_key_nothing_is_scored(running: Running) -> None:
    del running.http.headers["X-API-Key"]
    reply = running.http.post("rewards", json={"reward": {"name": "numeric"}, "rollouts": ROLLOUTS})
    assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")


def test_a_gateway_without_the_function_says_so() -> None:
    with gateway(model=None) as bare:
        answer = bare.post("rewards", {"reward": {"name": "numeric"}, "rollouts": ROLLOUTS}, status=422)
    assert "no reward function; allowed: one whose operator sets KNAPPER_REWARD_URL" in answer["detail"]


def test_a_function_that_is_not_there_is_a_reason_to_try_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with gateway(model=None, reward_url=f"http://127.0.0.1:{port}") as running:
        reply = running.http.post("rewards", json={"reward": {"name": "numeric"}, "rollouts": ROLLOUTS})
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json()["detail"].startswith("the reward function does not answer")


def test_a_process_that_ended_on_the_way_is_no_reason_for_an_error() -> None:
    """As one that was idle does while a call comes: its successor answers the same call."""
    requests: list[bytes] = []

    def hear(listener: socket.socket) -> None:
        for answer in (
            b"",
            b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"scores":[]}',
        ):
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as request:
                head = [line.lower() for line in iter(request.readline, b"\r\n")]
                length = next(line for line in head if line.startswith(b"content-length:"))
                requests.append(request.read(int(length.partition(b":")[2])))
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        function = threading.Thread(target=hear, args=(listener,), daemon=True)
        function.start()
        with gateway(model=None, reward_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as running:
            reply = running.post("rewards", {"reward": {"name": "numeric"}, "rollouts": ROLLOUTS})
        function.join()
    assert reply == {"scores": []}
    assert len(requests) == 2
    assert requests[0] == requests[1]
