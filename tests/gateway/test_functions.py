"""The gateway and the real functions, as processes over one directory: train, sample, kill and continue."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

import functions
from knapper.store.directory import DirectoryStore
from knapper.wire import proto
from tests.command import knapper
from tests.engine.tiny import tiny_model
from tests.gateway.running import MODEL, Running, fwdbwd, gateway


class Functions:
    """train_step and sample, in one process as one pod has them, on a port that survives them."""

    def __init__(self, directory: Path) -> None:
        self.model = tiny_model(directory / "model")
        self.store = directory / "data" / "store"
        self.log = directory / "functions.log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._environment = os.environ | {
            "KNAPPER_DATA": str(directory / "data"),
            "KNAPPER_MODEL": MODEL.name,
            "KNAPPER_MODEL_DIRECTORY": str(self.model),
            "KNAPPER_THREADS": "1",
            "KNAPPER_DTYPE": "float32",
            "K_SERVICE": "train-step",
            "KNAPPER_IDLE_S": "0.1",  # a pod is ended by Knative, never by itself
            "KNAPPER_HOLDER_ADDRESS": f"http://127.0.0.1:{self.port}",  # as a pod's, without a path
            "FUNCTION_SOURCES": os.pathsep.join(
                str(Path(functions.__path__[0]) / name / "main.py") for name in ("train_step", "sample")
            ),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "functions.shared:app", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--lifespan", "on"], env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Functions]:
    functions = Functions(tmp_path_factory.mktemp("functions"))
    yield functions
    functions.kill()


@pytest.fixture(scope="module")
def running(upstream: Functions) -> Iterator[Running]:
    model = msgspec.structs.replace(MODEL, train_step_url=upstream.url(), sample_url=upstream.url("/sample/"))
    with gateway(DirectoryStore(upstream.store), model=model, train_step_url="", sample_url="") as running:
        yield running


def wait_for(running: Running, request_id: str) -> httpx.Response:
    for _ in range(20):
        reply = running.http.post("retrieve_future", json={"request_id": request_id}, timeout=40)
        if reply.status_code != 408:
            return reply
    raise AssertionError("no result in a minute and a half")


def step(running: Running, run: str, seq: int) -> str:
    body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 0.01}}
    return str(running.post("optim_step", body)["request_id"])


def test_a_run_is_trained_and_sampled_from_zero_and_across_a_kill(running: Running, upstream: Functions) -> None:
    upstream.kill()
    session = running.session()
    run = running.make_run(session)  # nothing is running: the first doorbell goes unanswered
    time.sleep(1.2)
    state, reason = running.parts.train_client.queue_state(run)  # type: ignore[arg-type]
    assert state == "paused_capacity"
    assert reason is not None
    upstream.start()
    assert wait_for(running, f"{run}:0").json()["model_id"] == run

    for seq in (2, 1):  # out of order, as the SDK sends parallel chunks
        running.forward_backward(fwdbwd(run, seq))
    last = step(running, run, 3)
    first = proto.decode_forward_backward_output(wait_for(running, f"{run}:1").content)
    assert wait_for(running, f"{run}:2").headers["content-type"] == "application/x-protobuf"
    assert wait_for(running, last).json().get("error") is None
    assert first.outputs[0]["logprobs"].shape == (3,)

    upstream.kill()
    promise = running.forward_backward(fwdbwd(run, 4)).json()["request_id"]
    upstream.start()
    after = proto.decode_forward_backward_output(wait_for(running, promise).content)
    assert after.metrics["loss:sum"] < first.metrics["loss:sum"]

    saved = running.post("save_weights_for_sampler", {"model_id": run, "seq_id": 5, "path": "a"})["request_id"]
    path = wait_for(running, saved).json()["path"]
    assert path == f"tinker://{run}/sampler_weights/a"
    adapted = logprobs(running, session, {"model_path": path}, 0)
    base = logprobs(running, session, {"base_model": MODEL.name}, 1)
    assert adapted.shape == base.shape == (4,)
    assert not np.allclose(adapted[1:], base[1:])
    expected = after.outputs[0]["logprobs"]  # the trainer's, of tokens 1 2 3 after 0 1 2: the sampler says the same
    assert np.allclose(adapted[1:], expected, atol=1e-4)

    wrong = running.post("optim_step", {"model_id": run, "seq_id": 6, "adam_params": {"beta1": 2}})["request_id"]
    assert wait_for(running, wrong).json() == {
        "error": "adam_params.beta1 is 2; allowed: float < 1.0",
        "category": "user",
    }
    loaded = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
    assert "optimizer state" in running.post("load_weights", loaded, status=422)["detail"]
    promise = running.post("load_weights", loaded | {"optimizer": False})["request_id"]
    assert wait_for(running, promise).json()["model_id"] == f"{session}:train:1"
    copied = running.forward_backward(fwdbwd(f"{session}:train:1", 1)).json()["request_id"]
    same = proto.decode_forward_backward_output(wait_for(running, copied).content)
    assert np.array_equal(same.outputs[0]["logprobs"], expected)
    assert "knapper_operations_total" in httpx.get(upstream.url("/metrics")).text, "one page for both functions"


def logprobs(running: Running, session: str, source: dict[str, Any], n: int) -> Any:
    """Of the prompt 0 1 2 3."""
    body = {"session_id": session, "sampling_session_seq_id": n} | source
    sampler = running.post("create_sampling_session", body)["sampling_session_id"]
    promise = running.post(
        "asample",
        {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [0, 1, 2, 3]}]},
            "sampling_params": {"max_tokens": 1},
            "prompt_logprobs": True,
        },
    )
    reply = wait_for(running, promise["request_id"])
    assert reply.headers["content-type"] == "application/x-protobuf", reply.text
    return proto.decode_sample_response(reply.content).prompt_logprobs


def test_a_prompt_past_the_context_is_the_users_error(running: Running, upstream: Functions) -> None:
    if upstream.process is None or upstream.process.poll() is not None:
        upstream.start()
    session = running.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL.name}
    sampler = running.post("create_sampling_session", body)["sampling_session_id"]
    long = {"chunks": [{"type": "encoded_text", "tokens": [1] * 600}]}
    promise = running.post(
        "asample", {"sampling_session_id": sampler, "seq_id": 0, "prompt": long, "sampling_params": {}}
    )
    failed = wait_for(running, promise["request_id"]).json()
    assert failed["category"] == "user"
    assert "600" in failed["error"]


def test_the_seconds_that_samples_had_of_the_device_are_told_once(running: Running, upstream: Functions) -> None:
    if upstream.process is None or upstream.process.poll() is not None:
        upstream.start()

    def told(session: str) -> float:
        running.run(running.parts.sample_usage.flush())
        now = running.parts.clock()
        hours = [datetime.fromtimestamp(now // 3600 * 3600 + more, UTC).isoformat() for more in (-3600, 3600)]
        window = dict(zip(("starting_on", "ending_before"), hours, strict=True))
        events = running.http.get("billing/usage/events", params=window).raise_for_status().json()["data"]
        return float(
            sum(row["event_info"].get("device_seconds", 0.0) for row in events if row["session_id"] == session)
        )

    session = running.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL.name}
    sampler = running.post("create_sampling_session", body)["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [0, 1, 2, 3]}]}
    sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "num_samples": 2}
    sample["sampling_params"] = {"max_tokens": 64, "seed": 1}
    for _ in range(2):  # the second is answered by the first's answer
        reply = wait_for(running, running.post("asample", sample)["request_id"])
        assert reply.headers["content-type"] == "application/x-protobuf", reply.text
        assert "knapper-device-seconds" not in reply.headers, "between us and the function"
    once = told(session)
    assert once > 0
    wait_for(running, running.post("asample", {**sample, "seq_id": 1})["request_id"])
    assert told(session) > once
    usage = ("usage", "--hours", "2", "--url", running.url)
    printed = knapper(*usage).stdout
    line = rf"^{session}  {MODEL.name}: 8 prompt tokens, \d+ tokens sampled, \d+\.\d{{3}} device seconds$"
    assert re.search(line, printed, re.MULTILINE), printed
    rows = json.loads(knapper(*usage, "--json").stdout)
    (row,) = [row for row in rows if row["about"] == session]
    assert (row["base_model"], row["prompt_tokens"]) == (MODEL.name, 8)
    assert row["tokens_sampled"] > 0 < row["sampling_device_seconds"]
