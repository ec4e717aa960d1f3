"""Two gateways over one store, behind a proxy that sends requests to them in turn: clients notice nothing."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tinker import types

from knapper.local import web
from knapper.local.package_root import deployables
from tests.command import knapper
from tests.conformance.kill_client import datum, tokens
from tests.conformance.server import Server
from tests.gateway.console.conftest import csrf
from tests.gateway.running import serve

PROMPT = types.ModelInput.from_ints(tokens(1))
PARAMS = types.SamplingParams(max_tokens=5, seed=2, stop=[])


@dataclass
class Pod:
    """A gateway process."""

    process: subprocess.Popen[bytes]
    url: str

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
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            for _ in self.pods:
                pod = self.pods[next(self.turns) % len(self.pods)]
                url = f"{pod.url}{request.url.path}"
                try:
                    answer = await http.request(request.method, url, content=body, headers=headers)
                except httpx.TransportError:
                    continue
                self.statuses.append(answer.status_code)
                kept = {k: v for k, v in answer.headers.items() if k not in ("content-length", "content-encoding")}
                return Response(answer.content, answer.status_code, kept)
        return Response(b"no pod", 502)


def start(server: Server, log: Path, **changes: str) -> Pod:
    listener = web.bind("127.0.0.1", 0)
    with listener:
        listener.listen(web.BACKLOG)
        url = web.url(listener)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KNAPPER_")}
        settings = {"KNAPPER_DATA": str(server.data), "KNAPPER_HOLDER_ADDRESS": url, **changes}
        command = [
            sys.executable, "-P", "-m", "uvicorn", "--app-dir", str(deployables()), "--fd", str(listener.fileno()),
            "--http", web.PROTOCOL, "--ws", "none", "--lifespan", "on", "--log-level", "warning", "gateway.app:app",
        ]  # fmt: skip
        with log.open("ab") as written:
            process = subprocess.Popen(command, env=inherited | settings, stderr=written, pass_fds=[listener.fileno()])
    return Pod(process, url)


@pytest.fixture
def pods(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Pod]]:
    """`request.param`: their settings."""
    log = tmp_path / "gateways.log"
    pods = [start(server, log, **getattr(request, "param", {})) for _ in range(2)]
    yield pods
    for pod in pods:
        pod.process.terminate()
    for pod in pods:
        pod.process.wait(30)
    assert b"Traceback" not in log.read_bytes(), log.read_text()[-4000:]


@pytest.fixture
def balancer(pods: list[Pod]) -> Iterator[Balancer]:
    balancer = Balancer(pods)
    app = Starlette(routes=[Route("/{path:path}", balancer.forward, methods=["GET", "POST", "DELETE"])])
    with serve(app) as (balancer.url, _):
        yield balancer


def sampled(sampler: tinker.SamplingClient, count: int, disaster: Callable[[], None] = lambda: None) -> list[Any]:
    asked = [sampler.sample(PROMPT, num_samples=2, sampling_params=PARAMS) for _ in range(count)]
    disaster()
    return [[(one.tokens, one.logprobs) for one in each.result().sequences] for each in asked]


def lived(url: str, model: Path, disaster: Callable[[], None] = lambda: None) -> list[Any]:
    """Losses and samples of a run."""
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        passes = [training.forward_backward([datum(n)], "cross_entropy") for n in range(3)]
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses = [each.result().metrics["loss:sum"] for each in passes]
        sampler = training.save_weights_and_get_sampling_client().result()
        first = sampled(sampler, 4)
        return [losses, first, sampled(sampler, 4, disaster)]


@pytest.mark.timeout(120)
def test_a_run_behind_two_gateways_of_which_one_is_killed_is_that_of_one(
    server: Server, model: Path, balancer: Balancer
) -> None:
    def kill() -> None:
        assert 410 not in balancer.statuses, "every sample was found at the first try"
        balancer.pods[0].kill()

    assert lived(balancer.url, model, kill) == lived(server.url, model)


@pytest.mark.parametrize("pods", [{"KNAPPER_KEYS": "true"}], indirect=True)
def test_a_sample_is_answered_to_its_tenant_and_cancelled_by_whichever_gateway_is_asked(
    server: Server, model: Path, pods: list[Pod]
) -> None:
    published = server.data / "store" / "gateways"
    before = set(published.glob("*/*"))
    alice, mallory = ({"X-API-Key": key_of(server, tenant)} for tenant in ("alice", "mallory"))
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(httpx.Client(base_url=f"{pod.url}/api/v1/", headers=alice)) for pod in pods)
        session = posted(a, "create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"})
        body = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": str(model)}
        sampler = posted(a, "create_sampling_session", body)["sampling_session_id"]
        chunks = [{"type": "encoded_text", "tokens": tokens(1)}]
        ask: dict[str, Any] = {
            "sampling_session_id": sampler, "prompt": {"chunks": chunks}, "num_samples": 1,
            "sampling_params": {"max_tokens": 3, "seed": 2},
        }  # fmt: skip
        promised = {"request_id": posted(a, "asample", ask | {"seq_id": 0})["request_id"]}
        mine, theirs = (answer(client, promised) for client in (a, b))
        assert mine.status_code == 200, mine.text
        assert (theirs.status_code, theirs.content, theirs.headers["content-type"]) == (
            mine.status_code, mine.content, mine.headers["content-type"],
        )  # fmt: skip
        marked = b.post("retrieve_future", json=promised, headers={"Knapper-Forwarded": "1"})
        assert marked.status_code == 410, "what was forwarded once is not forwarded again"
        assert b.post("retrieve_future", json=promised, headers=mallory).status_code == 410, "it is not hers"
        slow = ask | {"seq_id": 1, "num_samples": 4, "sampling_params": {"max_tokens": 400, "seed": 2, "stop": []}}
        cancelled = {"request_id": posted(a, "asample", slow)["request_id"]}
        posted(b, "cancel_future", cancelled)
        assert [answer(client, cancelled).status_code for client in (a, b)] == [410, 410]
        assert len(set(published.glob("*/*")) - before) == 1, "who keeps no sample says nothing"


@pytest.mark.parametrize("pods", [{"KNAPPER_KEYS": "true"}], indirect=True)
def test_who_has_signed_in_at_one_gateway_has_at_the_other(server: Server, pods: list[Pod]) -> None:
    a, b = (pod.url for pod in pods)
    with httpx.Client(headers={"Accept": "text/html"}) as browser:  # cookies are of the host, whatever its port
        form = {"csrf": csrf(browser.get(f"{a}/signin")), "key": key_of(server, "alice"), "next": "/"}
        assert browser.post(f"{b}/signin", data=form).status_code == 303
        for url in (a, b):
            assert browser.get(f"{url}/").status_code == 200
        page = browser.get(f"{a}/")
        assert browser.post(f"{b}/signout", data={"csrf": csrf(page)}).status_code == 303
        assert [browser.get(f"{url}/").status_code for url in (a, b)] == [303, 303]


def key_of(server: Server, tenant: str) -> str:
    made = knapper("key", "create", tenant, "--data", str(server.data))
    assert made.returncode == 0, made.stderr
    found = re.search(r"tml-[0-9A-Za-z_-]+", made.stdout)
    assert found is not None, made.stdout
    return found[0]


def posted(client: httpx.Client, path: str, body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def answer(client: httpx.Client, promised: dict[str, str]) -> httpx.Response:
    """Of a poll, repeated while there is none."""
    while (reply := client.post("retrieve_future", json=promised, timeout=60)).status_code == 408:
        pass
    return reply
