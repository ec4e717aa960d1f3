"""Tokens: signed by the store's secret, good for an hour by the server's clock, and for nothing that was changed."""

import asyncio
import base64
import json
from collections.abc import Callable

import jwt
import pytest

from knapper import limits
from knapper.errors import InvalidToken
from knapper.ids import Tenant
from knapper.state.tokens import AccessTokens
from knapper.store.memory import MemoryStore

ACME = Tenant("acme")
KEY = "0123456789ab"


def opened(store: MemoryStore, clock: Callable[[], float] = lambda: 1000.0, new_id: str = "ab" * 16) -> AccessTokens:
    return asyncio.run(AccessTokens.open(store, clock, lambda: new_id))


def claims(token: str) -> dict[str, object]:
    payload = token.split(".")[1]
    found: dict[str, object] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return found


def test_a_token_says_whose_it_is_and_until_when() -> None:
    token = opened(MemoryStore()).issue(ACME, KEY)
    assert token.startswith("eyJ")
    assert claims(token) == {
        "sub": "tml:user:acme", "org_id": "acme", "email": "", "tenant": "acme", "key": KEY, "iat": 1000, "exp": 4600,
    }  # fmt: skip


def test_every_process_over_a_store_knows_its_tokens_and_no_other_store_does() -> None:
    store = MemoryStore()
    token = opened(store).issue(ACME, KEY)
    assert opened(store, new_id="cd" * 16).claims(token).tenant == ACME
    with pytest.raises(InvalidToken, match="not one that this server signed"):
        opened(MemoryStore(), new_id="cd" * 16).claims(token)


def test_a_token_expires_at_its_time_by_the_server_s_clock() -> None:
    now = [1000.0]
    tokens = opened(MemoryStore(), lambda: now[0])
    token = tokens.issue(ACME, KEY)
    now[0] += limits.token_s - 1
    assert tokens.claims(token).tenant == ACME
    now[0] += 1
    with pytest.raises(InvalidToken, match="expired"):
        tokens.claims(token)


def test_a_token_that_was_changed_or_made_up_is_refused() -> None:
    store = MemoryStore()
    tokens = opened(store)
    header, payload, signature = tokens.issue(ACME, KEY).split(".")
    other = tokens.issue(Tenant("other"), KEY).split(".")
    unsigned = jwt.encode(claims(tokens.issue(ACME, KEY)), "", algorithm="none")
    secret = asyncio.run(store.get("secrets/tokens")) or b""
    incomplete = jwt.encode({"tenant": "acme"}, secret, algorithm="HS256")
    for token in (
        f"{header}.{other[1]}.{signature}", f"{header}.{payload}.", f"{header}.{payload}", "eyJ", "eyJ.eyJ.x",
        unsigned, incomplete, jwt.encode(claims(tokens.issue(ACME, KEY)), "x" * 32, algorithm="HS256"),
    ):  # fmt: skip
        with pytest.raises(InvalidToken):
            tokens.claims(token)
