"""Tokens in the place of keys, with the SDK and with its command line."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types
from tinker.lib._jwt_auth import JwtAuthProvider

from knapper import limits
from tests.conformance.server import Server
from tests.gateway.running import Running, gateway

KEY = "tml-test-of-tokens"


@pytest.fixture(scope="module")
def jwt_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("knapper-jwt") / "data"
    with Server.start(model, data, settings={"KNAPPER_JWT": "true"}) as running:
        yield running


def token_of(holder: object) -> str:
    """What the client sends in the key's place."""
    provider = holder._default_auth  # type: ignore[attr-defined]  # the SDK has no public way
    assert isinstance(provider, JwtAuthProvider)
    return provider._token


def test_clients_send_tokens_and_everything_works(jwt_server: Server, model: Path) -> None:
    with tinker.ServiceClient(base_url=jwt_server.url, api_key=KEY) as service:
        training = service.create_lora_training_client(str(model), rank=2).result()
        assert token_of(service.holder).startswith("eyJ")
        tokens = list(range(9))
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 8},
        )
        assert training.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"] > 0
        training.optim_step(types.AdamParams()).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(types.ModelInput.from_ints(tokens), 1, types.SamplingParams(max_tokens=3)).result()
        assert len(sampled.sequences) == 1


def test_whoami_tells_the_tenant(jwt_server: Server) -> None:
    found = tinker.RestClient(base_url=jwt_server.url, api_key=KEY).whoami().result()
    assert (found.user_urn, found.org_urn, found.email) == ("tml:user:local", "tml:organization:local", None)


def test_a_token_buys_no_other(jwt_server: Server) -> None:
    with httpx.Client(base_url=f"{jwt_server.url}/api/v1/", trust_env=False) as http:
        bought = http.post("auth/token", json={}, headers={"X-API-Key": KEY}).json()["jwt"]
        assert http.get("get_server_capabilities", headers={"X-API-Key": bought}).status_code == 200
        refused = http.post("auth/token", json={}, headers={"X-API-Key": bought})
        assert refused.status_code == 401
        assert "allowed here: the key" in refused.json()["detail"]


class Clock:
    """The server's, which can be ahead of the client's."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def running(clock: Clock) -> Iterator[Running]:
    with gateway(jwt=True, clock=clock) as running:
        yield running


def test_a_client_whose_token_expired_gets_another_and_goes_on(running: Running, clock: Clock) -> None:
    client = tinker.RestClient(base_url=running.url, api_key=KEY)
    assert client.get_server_capabilities().result().supported_models
    first = token_of(client.holder)
    clock.ahead_s = limits.token_s + 60
    refused = running.http.get("get_server_capabilities", headers={"X-API-Key": first})
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_token")
    assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert client.get_server_capabilities().result().supported_models
    assert token_of(client.holder) != first


def test_tokens_are_off_unless_a_setting_says_otherwise(server: Server) -> None:
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": KEY}, trust_env=False) as http:
        assert http.post("client/config", json={}).json()["pjwt_auth_enabled"] is False
        refused = http.post("auth/token", json={})
        assert refused.status_code == 422
        assert "issues no tokens" in refused.json()["detail"]
        refused = http.get("get_server_capabilities", headers={"X-API-Key": "eyJ.eyJ.x"})
        assert refused.status_code == 401
        assert "WWW-Authenticate" not in refused.headers, "the SDK would exchange its key again and again"


def run(home: Path, url: str, *command: str, said: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    environment |= {"HOME": str(home), "TINKER_BASE_URL": url, "TINKER_TELEMETRY": "0"}
    return subprocess.run(
        [Path(sys.executable).with_name("tinker"), *command],
        env=environment, input=said, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_line_logs_in_says_who_and_logs_out(jwt_server: Server, tmp_path: Path) -> None:
    login = run(tmp_path, jwt_server.url, "auth", "login", said=KEY + "\n")
    assert login.returncode == 0, login.stderr
    assert "Logged in as local (local). Stored API key 'local'" in login.stdout
    assert KEY in (tmp_path / ".tinker/credentials.json").read_text()
    status = run(tmp_path, jwt_server.url, "auth", "status")
    assert "Tinker accessible: yes" in status.stdout, status.stderr
    who = run(tmp_path, jwt_server.url, "auth", "whoami")
    assert "tml:user:local" in who.stdout, who.stderr
    assert run(tmp_path, jwt_server.url, "auth", "logout").returncode == 0
    assert KEY not in (tmp_path / ".tinker/credentials.json").read_text()
