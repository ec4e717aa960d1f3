"""Gateway processes over the store of a running server, and what may stand between them and their clients."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from knapper.local import web
from knapper.local.package_root import deployables
from tests.command import knapper
from tests.conformance.kill_client import tokens
from tests.conformance.server import Server

FORWARDED = {"Knapper-Forwarded": "1"}  # a gateway that is sent this does what it is asked itself
LONG: dict[str, int] = {"samples": 16, "max_tokens": 400}
_AHEAD = """
import sys, time
real, ahead_s = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + ahead_s
import uvicorn
uvicorn.main()
"""


@dataclass
class Pod:
    """A gateway process. `address`: where other gateways are told that it is."""

    process: subprocess.Popen[bytes]
    url: str
    address: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass
class Balancer:
    """As a Service: each request goes to the next pod that takes connections."""

    pods: list[Pod]
    url: str = ""
    turns: Iterator[int] = field(default_factory=itertools.count)
    statuses: list[int] = field(default_factory=list)

    async def forward(self, request: Request) -> Response:
        for _ in self.pods:
            pod = self.pods[next(self.turns) % len(self.pods)]
            try:
                answer = await _passed_on(request, pod.url)
            except httpx.TransportError:
                continue
            self.statuses.append(answer.status_code)
            return answer
        return Response(b"no pod", 502)


@dataclass
class Front:
    """Stands at a pod's address, as queue-proxy does. `loses`: answers are lost on the way back, but for healthz.

    `is_other`: the pod is gone, and something else has its address. `seen`: headers of requests while it had.
    """

    target: str = ""
    loses: bool = False
    is_other: bool = False
    seen: list[dict[str, str]] = field(default_factory=list)

    async def forward(self, request: Request) -> Response:
        if self.is_other:
            self.seen.append(dict(request.headers))
            return Response(b"404 page not found", 404)
        answer = await _passed_on(request, self.target)
        return Response(b"bad gateway", 502) if self.loses and "healthz" not in request.url.path else answer


async def _passed_on(request: Request, url: str) -> Response:
    body = await request.body()
    headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        answer = await http.request(request.method, f"{url}{request.url.path}", content=body, headers=headers)
    kept = {k: v for k, v in answer.headers.items() if k not in ("content-length", "content-encoding")}
    return Response(answer.content, answer.status_code, kept)


def app_of(proxy: Balancer | Front) -> Starlette:
    return Starlette(routes=[Route("/{path:path}", proxy.forward, methods=["GET", "POST", "DELETE"])])


def start(server: Server, log: Path, *, ahead_s: float = 0.0, address: str = "", **changes: str) -> Pod:
    """`ahead_s`: of its clock. `address`: else its own. `changes`: of its settings."""
    listener = web.bind("127.0.0.1", 0)
    with listener:
        listener.listen(web.BACKLOG)
        url = web.url(listener)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KNAPPER_")}
        settings = {"KNAPPER_DATA": str(server.data), "KNAPPER_HOLDER_ADDRESS": address or url, **changes}
        command = [
            sys.executable, "-P", "-c", _AHEAD, str(ahead_s), "--app-dir", str(deployables()),
            "--fd", str(listener.fileno()), "--http", web.PROTOCOL, "--ws", "none", "--lifespan", "on",
            "--log-level", "warning", "gateway.app:app",
        ]  # fmt: skip
        with log.open("ab") as written:
            process = subprocess.Popen(command, env=inherited | settings, stderr=written, pass_fds=[listener.fileno()])
    return Pod(process, url, address or url)


@contextlib.contextmanager
def gateways(server: Server, log: Path, *changes: dict[str, Any]) -> Iterator[list[Pod]]:
    """One with each of these settings."""
    pods = [start(server, log, **each) for each in changes]
    try:
        yield pods
    finally:
        for pod in pods:
            pod.process.send_signal(signal.SIGCONT)
            pod.process.terminate()
        for pod in pods:
            pod.process.wait(30)
    assert b"Traceback" not in log.read_bytes(), log.read_text()[-4000:]


@contextlib.contextmanager
def clients_of(pods: list[Pod], key: str = "tml-local") -> Iterator[list[httpx.Client]]:
    with contextlib.ExitStack() as stack:
        headers = {"X-API-Key": key}
        yield [
            stack.enter_context(httpx.Client(base_url=f"{pod.url}/api/v1/", headers=headers, timeout=60))
            for pod in pods
        ]


def key_of(server: Server, tenant: str) -> str:
    made = knapper("key", "create", tenant, "--data", str(server.data))
    assert made.returncode == 0, made.stderr
    found = re.search(r"tml-[0-9A-Za-z_-]+", made.stdout)
    assert found is not None, made.stdout
    return found[0]


def posted(client: httpx.Client, path: str, body: Any, **headers: str) -> Any:
    reply = client.post(path, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def answer(client: httpx.Client, promised: dict[str, Any]) -> httpx.Response:
    """Of a poll, repeated while there is none."""
    poll = {"request_id": promised["request_id"]}
    while (reply := client.post("retrieve_future", json=poll, timeout=60)).status_code == 408:
        pass
    return reply


def name_of(client: httpx.Client) -> str:
    """Of the gateway."""
    return client.get("healthz").headers["Knapper-Gateway"]


def owner_first(clients: list[httpx.Client], promised: dict[str, Any]) -> list[httpx.Client]:
    """Both, the one whose gateway keeps the sample first."""
    return sorted(clients, key=lambda client: name_of(client) not in promised["request_id"])


def sampler_at(client: httpx.Client, model: Path) -> tuple[str, str]:
    """A session, and a sampler of the base model in it."""
    session = posted(client, "create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"})
    body = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": str(model)}
    return session["session_id"], posted(client, "create_sampling_session", body)["sampling_session_id"]


def sample_of(sampler: str, seq: int, *, samples: int = 1, max_tokens: int = 3) -> dict[str, Any]:
    """The request for a sample that does not end before `max_tokens`."""
    chunks = [{"type": "encoded_text", "tokens": tokens(1)}]
    return {
        "sampling_session_id": sampler, "prompt": {"chunks": chunks}, "num_samples": samples, "seq_id": seq,
        "sampling_params": {"max_tokens": max_tokens, "seed": 2, "stop": []},
    }  # fmt: skip
