"""Every way out works where there is no sandbox, and none works in it."""

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from knapper.rewards import scorer, spec
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.scorer import RewardFailed
from knapper.sandbox.pool import Sandbox
from tests.security import attempts

SOURCE = "from typing import Any\nWorld = dict[str, Any]\n\n" + "\n\n".join(
    inspect.getsource(function) for function in attempts.ALL.values()
)
# True and False are what an attempt says of itself; an error is a refusal.
INSIDE = (
    SOURCE
    + """

def reward(prompt, completion, answer):
    try:
        return float(bool(globals()[completion](answer)))
    except BaseException:
        return 0.0
"""
)
OUTSIDE = SOURCE + "\nimport json, sys\nprint(bool(globals()[sys.argv[1]](json.loads(sys.argv[2]))))\n"


# What a container, or a machine whose users are no root, may refuse by itself.
CLOSED_ELSEWHERE_TOO = {"makes_a_namespace", "traces_another", "writes_into_shared_memory"}


@dataclass
class World:
    """What there is to be reached."""

    directory: Path
    port: int
    victim: "subprocess.Popen[bytes]"
    reached: list[str]

    def visits(self) -> list[str]:
        """Every visit of the page until now, which it forgets; it serves one after another, so ours is the last."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/last", timeout=30) as answer:
            answer.read()
        *visits, connection, path = self.reached
        assert (connection, path) == ("connection", "/last")
        self.reached.clear()
        return visits

    def told(self, name: str) -> dict[str, object]:
        """What the attempt is told; the files that it may spoil are its own."""
        scratch = self.directory / name
        scratch.mkdir()
        (scratch / "victim").write_text("as it was")
        return {
            "canary": str(self.directory / "canary"), "symlink": str(self.directory / "symlink"),
            "scratch": str(scratch), "victim_file": str(scratch / "victim"),
            "port": self.port, "unix": str(self.directory / "unix"), "pid": self.victim.pid,
        }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    directory.chmod(0o755)
    (directory / "canary").write_text("sings")
    (directory / "symlink").symlink_to(directory / "canary")
    reached: list[str] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)
            self.send_response(200)
            self.end_headers()

        def handle(self) -> None:
            reached.append("connection")
            super().handle()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener, subprocess.Popen(["sleep", "1000"]) as victim:
        listener.bind(str(directory / "unix"))
        listener.listen()
        yield World(directory, server.server_address[1], victim, reached)
        victim.kill()
    server.shutdown()
    server.server_close()
    Path(f"/dev/shm/knapper-{victim.pid}").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def sandbox(runner: asyncio.Runner) -> Iterator[Sandbox]:
    sandbox = Sandbox(at_once=1)
    yield sandbox
    runner.run(sandbox.close())


def test_there_are_forty_attempts() -> None:
    assert len(attempts.ALL) >= 40


@pytest.mark.parametrize("name", attempts.ALL)
def test_the_way_out_is_closed(name: str, world: World, sandbox: Sandbox, runner: asyncio.Runner) -> None:
    outside = subprocess.run(
        [sys.executable, "-S", "-c", OUTSIDE, name, json.dumps(world.told(f"{name}-outside"))],
        env={**os.environ, "CANARY": "sings"}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    works = outside.stdout.strip() == "True"
    assert works or name in CLOSED_ELSEWHERE_TOO, f"the attempt itself is broken:\n{outside.stderr[-2000:]}"

    world.visits()
    arguments = world.told(f"{name}-inside")
    os.environ["CANARY"] = "sings"
    reward = spec.parse({"code": "reward.py"}, {"reward.py": INSIDE.encode()})
    try:
        (scored,) = runner.run(scorer.score(reward, [ScorableRollout("r", "", name, arguments)], sandbox=sandbox))
        outcome = f"{scored.value}"
    except RewardFailed as error:
        outcome = error.reason
    finally:
        del os.environ["CANARY"]
    assert outcome == "0.0" or "ended" in outcome or "killed" in outcome
    assert world.visits() == []
    assert world.victim.poll() is None
    assert sorted(path.name for path in Path(str(arguments["scratch"])).iterdir()) == ["victim"]
    assert Path(str(arguments["victim_file"])).read_text() == "as it was"
    assert (world.directory / "canary").read_text() == "sings"
