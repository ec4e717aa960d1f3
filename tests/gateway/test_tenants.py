"""Authentication: the key as any client sends it, and the machine it comes from."""

import itertools
from collections.abc import Iterator

import httpx
import pytest
from starlette.requests import Request

from gateway.tenants import is_token, on_this_machine
from knapper.ids import Tenant
from knapper.state.api_keys import Keys
from tests.gateway.running import Running, gateway


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with gateway(keys=True) as running:
        yield running


@pytest.fixture(scope="module")
def keys(running: Running) -> dict[str, str]:
    made, numbers = Keys(running.store, running.parts.clock), itertools.count()
    return {
        tenant: running.run(made.create(Tenant(tenant), "", lambda: f"{next(numbers):064x}"))[0]
        for tenant in ("alice", "bob")
    }


def asker(running: Running, headers: dict[str, str]) -> httpx.Response:
    return httpx.get(f"{running.url}/api/v1/auth/apikey/me", headers=headers, timeout=30)


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", "Bearer \t{}"])
def test_a_key_comes_as_openai_s_clients_send_it(form: str, running: Running, keys: dict[str, str]) -> None:
    answer = asker(running, {"Authorization": form.format(keys["alice"])})
    assert answer.json()["details"]["org_details"]["name"] == "alice"


def test_the_tinker_sdk_s_header_comes_first(running: Running, keys: dict[str, str]) -> None:
    answer = asker(running, {"Authorization": f"Bearer {keys['alice']}", "X-API-Key": keys["bob"]})
    assert answer.json()["details"]["org_details"]["name"] == "bob"


@pytest.mark.parametrize("form", ["", "Bearer", "Basic {}", "{}", "Bearer{}", "x Bearer {}"])
def test_what_is_no_key_is_said_to_be_missing_and_how_to_get_one(
    form: str, running: Running, keys: dict[str, str]
) -> None:
    answer = asker(running, {"Authorization": form.format(keys["alice"])})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert (
        "X-API-Key is missing; allowed: a key that the server's operator made with `knapper key create`" in answer.text
    )


def test_where_keys_are_off_any_key_is_named_as_allowed() -> None:
    with gateway() as keyless:
        assert "X-API-Key is missing; allowed: any key that begins with tml-" in asker(keyless, {}).text


def test_where_no_tokens_are_issued_a_token_is_refused_as_one(running: Running) -> None:
    assert is_token("eyJhbGciOi")
    assert not is_token("tml-eyJ")
    answer = asker(running, {"X-API-Key": "eyJhbGciOi"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert "holds a token, and this server issues none" in answer.text


@pytest.mark.parametrize(
    ("client", "here"),
    [
        (None, True), ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.7", False), ("10.0.0.7", False), ("fd00::7", False), ("testclient", False), ("", False),
    ],
)  # fmt: skip
def test_which_clients_are_on_this_machine(client: str | None, here: bool) -> None:
    request = Request({"type": "http", "client": None if client is None else (client, 1)})
    assert on_this_machine(request) is here


@pytest.mark.parametrize(
    ("jwt", "code", "said"),
    [(True, "invalid_token", "not one that this server signed"), (False, "unauthorized", "issues none")],
)
def test_a_token_of_elsewhere_is_refused_where_keys_are_off_too(jwt: bool, code: str, said: str) -> None:
    with gateway(jwt=jwt) as keyless:
        answer = asker(keyless, {"X-API-Key": "eyJhbGciOi"})
        assert (answer.status_code, answer.json()["code"]) == (401, code)
        assert said in answer.json()["detail"]
