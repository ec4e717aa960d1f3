"""`knapper up` with the real gateway: it comes up, stays up, goes down, and says clearly why it cannot come up."""

import asyncio
import json
import os
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

from knapper.catalogue.servable import record_of
from knapper.catalogue.served_models import Catalogue
from knapper.events.function_key import FunctionKey
from knapper.store.directory import DirectoryStore
from tests.engine.tiny import tiny_model
from tests.local.work import gone, make_root, until

_UP = """
import sys
from pathlib import Path
import knapper.cli.main, knapper.local.package_root
root = Path(sys.argv.pop(1))
knapper.local.package_root.deployables = lambda: root
knapper.cli.main.main()
"""


class Up:
    """A running `knapper up`, in a process group of its own."""

    def __init__(self, process: "subprocess.Popen[str]", data: Path, log: Path) -> None:
        self.process = process
        self.data = data
        self._log = log
        self.url = ""

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), self.log()
        self.url = line.removeprefix("ready: ").strip()

    def processes(self) -> dict[str, dict[str, int]]:
        path = self.data / "run" / "processes.json"
        roles: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
        return roles

    def pid(self, role: str) -> int:
        return self.processes()[role]["pid"]

    def ring(self, function: str = "train_step") -> int:
        """Call a function, which sleeps perhaps; the pid that answered."""
        (served,) = asyncio.run(Catalogue(DirectoryStore(self.data / "store")).models())
        url = {"train_step": served.train_step_url, "sample": served.sample_url}[function]
        opening = asyncio.run(FunctionKey(DirectoryStore(self.data / "store")).headers())
        answer = httpx.post(url, headers=opening, trust_env=False)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["pid"])

    def healthy(self) -> bool:
        return httpx.get(f"{self.url}/api/v1/healthz", trust_env=False, timeout=30).status_code == 200

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "models" / "tiny", context=128)


@contextmanager
def running(tmp_path: Path, model: Path, *options: str) -> Iterator[Up]:
    root = tmp_path / "root" if (tmp_path / "root").exists() else make_root(tmp_path)
    data, log = tmp_path / "data", tmp_path / f"{len(list(tmp_path.glob('*.log')))}.log"
    command = [sys.executable, "-c", _UP, str(root), "up", "--model", str(model), "--data", str(data)]
    with log.open("w") as stderr, subprocess.Popen(
        [*command, "--port", "0", *options], stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        env={**os.environ, "KNAPPER_CACHE": str(tmp_path / "cache")},
    ) as process:  # fmt: skip
        try:
            yield Up(process, data, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_it_comes_up_and_ctrl_c_ends_all_of_it_without_a_traceback(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model) as up:
        up.wait_until_ready()
        assert up.healthy()
        up.ring()
        pids = [up.pid(role) for role in ("supervisor", "gateway", "broker", "engine")]
        os.killpg(up.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert up.process.wait() == 0
        assert all(gone(pid) for pid in pids)
        assert "Traceback" not in up.log()
        assert not (up.data / "run" / "processes.json").exists()


def test_sigterm_before_it_is_ready_ends_it_cleanly(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model) as up:
        asyncio.run(until(lambda: "gateway" in up.processes()))
        gateway = up.pid("gateway")
        up.process.terminate()
        assert up.process.wait() == 0
        assert gone(gateway)
        assert "Traceback" not in up.log()


def test_a_gateway_that_was_killed_is_back_on_its_port_and_refuses_nobody(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model) as up:
        up.wait_until_ready()
        before = up.pid("gateway")
        os.kill(before, signal.SIGKILL)
        asyncio.run(until(lambda: gone(before)))
        assert up.healthy()  # at once, on the same port: the connection waits for the new process
        assert up.pid("gateway") != before


def test_an_engine_that_was_killed_is_started_by_the_next_bell(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model) as up:
        up.wait_until_ready()
        first = up.ring()
        assert up.pid("engine") == first
        os.kill(first, signal.SIGKILL)
        assert up.ring("sample") != first


def test_isolated_functions_scale_to_zero_one_by_one(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model, "--isolated", "--idle", "0.3") as up:
        up.wait_until_ready()
        pids = {up.ring("train_step"), up.ring("sample")}
        assert len(pids) == 2
        asyncio.run(until(lambda: {*up.processes()} == {"supervisor", "gateway", "broker"}))
        assert all(gone(pid) for pid in pids)
        assert up.log().count("scaled to zero") == 2


def test_kill_9_of_the_supervisor_ends_every_process_and_leaves_the_data_usable(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model) as up:
        up.wait_until_ready()
        up.ring()
        children = [up.pid(role) for role in ("gateway", "broker", "engine")]
        up.process.kill()
        asyncio.run(until(lambda: all(gone(pid) for pid in children)))
    with running(tmp_path, model) as again:
        again.wait_until_ready()


def test_the_model_is_in_the_catalogue_and_an_earlier_one_is_not_served_any_more(tmp_path: Path, model: Path) -> None:
    catalogue = Catalogue(DirectoryStore(tmp_path / "data" / "store"))
    earlier = record_of(model, "org/earlier", dtype="auto", train_step_url="http://x/", sample_url="http://x/")
    asyncio.run(catalogue.publish(earlier))
    with running(tmp_path, model) as up:
        up.wait_until_ready()
        up.ring()
        port = up.processes()["engine"]["port"]
        (served,) = asyncio.run(catalogue.models())
        assert (served.name, served.tokenizer_id) == (str(model), str(model))
        assert (served.context, served.vocab, served.arch) == (128, 268, "LlamaForCausalLM")
        assert served.train_step_url == f"http://127.0.0.1:{port}/train_step/"


def test_whoever_closes_its_output_after_the_first_line_leaves_it_running(tmp_path: Path, model: Path) -> None:
    root = make_root(tmp_path)
    command = [
        sys.executable,
        "-u",
        "-c",
        _UP,
        str(root),
        "up",
        "--model",
        str(model),
        "--data",
        str(tmp_path / "data"),
    ]
    ours, theirs = os.pipe()
    with subprocess.Popen([*command, "--port", "0"], stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.close(ours)  # nobody reads a line
        asyncio.run(until((tmp_path / "data" / "run" / "processes.json").exists))
        up = Up(process, tmp_path / "data", tmp_path / "log")
        asyncio.run(until(lambda: "gateway" in up.processes()))
        time.sleep(2)
        assert process.poll() is None
        process.terminate()
        assert process.wait() == 0


def _refusal(tmp_path: Path, model: Path, *options: str) -> str:
    with running(tmp_path, model, *options) as up:
        assert up.process.wait() == 1
        assert "Traceback" not in up.log()
        return up.log()


def test_a_taken_port_is_refused(tmp_path: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = _refusal(tmp_path, model, "--port", str(port))
    assert f"knapper: port is {port}; allowed: a free port of 127.0.0.1" in said


def test_a_host_that_is_not_ours_is_refused(tmp_path: Path, model: Path) -> None:
    assert "192.0.2.1" in _refusal(tmp_path, model, "--host", "192.0.2.1")  # an address kept for documentation


def test_a_data_directory_in_use_is_refused(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, model) as up:
        up.wait_until_ready()
        said = _refusal(tmp_path, model)
        assert f"Process {up.process.pid} uses it" in said
        assert up.healthy()


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "neither a directory nor a name" in _refusal(tmp_path, tmp_path / "nowhere")


def test_a_model_without_a_context_length_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text('{"architectures": ["X"], "vocab_size": 3}')
    assert "max_position_embeddings" in _refusal(tmp_path, model)


def test_a_gateway_that_cannot_begin_says_why_and_ends_the_rest(tmp_path: Path, model: Path) -> None:
    root = make_root(tmp_path)
    (root / "gateway").unlink()
    (root / "gateway").mkdir()
    (root / "gateway" / "__init__.py").touch()
    (root / "gateway" / "app.py").write_text("raise RuntimeError('no gateway today')")
    with running(tmp_path, model) as up:
        assert up.process.wait() == 1
        assert "knapper: the gateway did not start (exit code 1)" in up.log()
        assert up.log().count("RuntimeError: no gateway today") == 2  # as it happened, and as the reason at the end


def test_a_request_is_for_whom_its_target_names_and_not_for_whom_its_host_does(tmp_path: Path, model: Path) -> None:
    """As to a proxy; without keys the server answers by its machine's own names."""

    def ask(target: str, *hosts: str) -> int:
        lines = [f"GET {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), "Connection: close", "", ""]
        with socket.create_connection(("127.0.0.1", int(up.url.rpartition(":")[2]))) as raw:
            raw.sendall("\r\n".join(lines).encode())
            return int(raw.makefile("rb").readline().split()[1])

    with running(tmp_path, model) as up:
        up.wait_until_ready()
        path = "/api/v1/healthz"
        assert ask(path, "localhost") == ask(f"http://127.0.0.1:8000{path}", "localhost") == 200
        assert ask(f"http://[::1]:8000{path}", "localhost") == 200
        assert ask(f"http://localhost{path}", "attacker.example") == 200, "for this machine, whatever a proxy says"
        for target in ("http://attacker.example", "http://attacker.example:8000", "https://localhost.attacker.example"):
            assert ask(f"{target}{path}", "127.0.0.1") == 403
        assert ask(path, "127.0.0.1", "attacker.example") == 403
        assert ask(f"http://localhost{path}", "localhost", "localhost") == 403
