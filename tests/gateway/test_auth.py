"""The description of a key, and the token that a client gets for it."""

from knapper.ids import Tenant
from knapper.state.api_keys import Keys
from tests.gateway.running import Running, gateway


def claims(running: Running, key: str) -> tuple[str, str]:
    """(tenant, key's id) of the token that the key is exchanged for."""
    token = running.post("auth/token", headers={"X-API-Key": key})["jwt"]
    tokens = running.parts.access_tokens
    assert tokens is not None
    claims_of_token = tokens.claims(token)
    return claims_of_token.tenant, claims_of_token.key


def test_where_keys_are_off_a_token_names_none_and_a_key_is_described_so() -> None:
    with gateway(jwt=True) as running:
        assert claims(running, "tml-x") == ("local", "")
        assert running.http.get("auth/apikey/me").json() == {
            "key_id": 0, "name": "local",
            "note": "keys are off: any key that begins with tml- is good, and everyone is the same tenant",
            "details": {"org_details": {"name": "local"}, "user_details": {"email": "local"}},
        }  # fmt: skip
        refused = running.http.delete("auth/apikey/me")
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert "keys are off on this server" in refused.json()["detail"]


def test_a_token_dies_with_the_key_that_it_names() -> None:
    with gateway(jwt=True, keys=True) as running:
        key, record = running.run(
            Keys(running.store, running.parts.clock).create(Tenant("alice"), "", lambda: "0" * 64)
        )
        assert claims(running, key) == ("alice", record.id)
        deleted = running.http.delete("auth/apikey/me", headers={"X-API-Key": key})
        assert (deleted.status_code, deleted.json()) == (200, {"status": "ok"})
        assert running.http.get("auth/apikey/me", headers={"X-API-Key": key}).status_code == 401


def test_a_server_without_tokens_says_so_and_a_token_buys_no_other() -> None:
    with gateway() as running:
        refused = running.http.post("auth/token")
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert "KNAPPER_JWT is false" in refused.json()["detail"]
    with gateway(jwt=True) as running:
        token = running.post("auth/token")["jwt"]
        refused = running.http.post("auth/token", headers={"X-API-Key": token})
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert "allowed here: the key that begins with tml-" in refused.json()["detail"]
