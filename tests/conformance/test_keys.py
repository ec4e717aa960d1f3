"""Keys from `knapper key create` to their end, with the SDK, its command line, and a server of their own."""

import time
from pathlib import Path

import httpx
import pytest
import tinker

from knapper.ids import Tenant
from knapper.state.api_keys import Keys
from tests.conformance.server import Server
from tests.conformance.test_auth import run as tinker_command
from tests.gateway.running import gateway
from tests.security.test_keys import knapper


def test_a_server_with_keys_from_the_command_line_on(model: Path, tmp_path: Path) -> None:
    """Two tenants with the SDK and its command line; a key that ends; and no key in any log or file."""
    data = tmp_path / "data"
    with Server.start(model, data, settings={"KNAPPER_KEYS": "true", "KNAPPER_LOG_LEVEL": "debug"}) as server:
        printed = [knapper(data, "key", "create", tenant, "--note", "laptop") for tenant in ("alice", "bob")]
        alice, bob = (each.stdout.strip() for each in printed)
        assert [each.returncode for each in printed] == [0, 0]
        assert alice not in printed[0].stderr
        with tinker.ServiceClient(base_url=server.url, api_key=alice) as service:
            service.create_sampling_client(base_model=str(model)).result()
            session = service.holder._session_id or ""
        seen = {key: tinker.RestClient(base_url=server.url, api_key=key) for key in (alice, bob)}
        assert seen[alice].list_sessions().result().sessions == [session]
        assert seen[bob].list_sessions().result().sessions == []
        with pytest.raises(tinker.NotFoundError):
            seen[bob].get_session(session).result()
        with pytest.raises(tinker.AuthenticationError):
            tinker.RestClient(base_url=server.url, api_key="tml-local").list_sessions().result()
        login = tinker_command(tmp_path, server.url, "auth", "login", said=alice + "\n")
        assert "Logged in as alice (alice)" in login.stdout, login.stderr
        listed = knapper(data, "key", "list").stdout
        assert [line.split()[1] for line in listed.splitlines()] == ["alice", "bob"]
        key_id = listed.split()[0]
        assert knapper(data, "key", "revoke", key_id).stdout == f"key {key_id} of tenant alice is revoked\n"
        time.sleep(1.0)
        with pytest.raises(tinker.AuthenticationError, match="was revoked"):
            seen[alice].list_sessions().result()
        assert seen[bob].list_sessions().result().sessions == []
    for secret in (alice, bob):
        assert secret not in server.log()
        assert not [path for path in data.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_proxy_on_this_machine_lets_nobody_else_in(server: Server) -> None:
    """A server without keys believes a proxy beside it, which names its client, and refuses who is elsewhere."""
    url = f"{server.url}/api/v1/get_server_capabilities"
    for forwarded, status in (("", 200), ("127.0.0.1", 200), ("10.0.0.7", 401), ("127.0.0.1, 10.0.0.7", 401)):
        headers = {"X-API-Key": "tml-local"} | ({"X-Forwarded-For": forwarded} if forwarded else {})
        assert httpx.get(url, headers=headers, trust_env=False).status_code == status, forwarded


def test_with_tokens_the_sdk_says_whose_it_is_and_ends_with_its_key() -> None:
    with gateway(keys=True, jwt=True) as running:
        keys = Keys(running.store, time.time)
        key, record = running.run(keys.create(Tenant("alice"), "", lambda: "0" * 64))
        client = tinker.RestClient(base_url=running.url, api_key=key)
        assert client.whoami().result().org_urn == "tml:organization:alice"
        assert client.get_server_capabilities().result().supported_models
        running.run(keys.revoke(record.id))
        time.sleep(1.0)
        with pytest.raises(tinker.AuthenticationError, match="was revoked"):
            client.get_server_capabilities().result()
