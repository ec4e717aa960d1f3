"""Keys: shown once, stored as a hash, refused within a second of their end, and never in a log."""

import asyncio
import gc
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import structlog

from knapper import ids, limits
from knapper.errors import InvalidField, NotFound, StoreError, Unauthorized, UserError
from knapper.ids import Tenant
from knapper.settings import Settings
from knapper.state.api_keys import Key, Keyring, Keys
from knapper.state.journal.records import encode
from knapper.state.tokens import AccessTokens
from knapper.store.memory import MemoryStore
from tests import command
from tests.gateway.running import Running, gateway
from tests.gateway.saved import Clock

ALICE = Tenant("alice")


def made(keys: Keys, tenant: Tenant = ALICE, note: str = "", n: int = 1) -> tuple[str, Key]:
    return asyncio.run(keys.create(tenant, note, lambda: f"{n:064x}"))


@pytest.fixture
def keys() -> Keys:
    return Keys(MemoryStore(), lambda: 1000.0)


# ---- what is stored


def test_the_store_has_a_hash_and_never_the_key(keys: Keys) -> None:
    key, record = made(keys, note="laptop")
    assert key == f"tml-{1:064x}"
    assert (record.tenant, record.note, record.created_at, record.revoked_at) == ("alice", "laptop", 1000.0, 0.0)
    stored = asyncio.run(keys.store.list(""))
    assert stored == [f"keys/{record.id}/{ids.number(1)}"]
    content = asyncio.run(keys.store.get(stored[0])) or b""
    assert key.encode() not in content
    assert bytes.fromhex(key.removeprefix("tml-")) not in content


def test_two_keys_never_share_an_id(keys: Keys) -> None:
    secrets = itertools.chain([f"{1:064x}", f"{1:064x}"], (f"{n:064x}" for n in itertools.count(2)))
    first, second = (asyncio.run(keys.create(ALICE, "", lambda: next(secrets)))[1] for _ in range(2))
    assert first.id != second.id


def test_keys_are_listed_as_they_stand(keys: Keys) -> None:
    records = [made(keys, Tenant(tenant), n=n)[1] for n, tenant in enumerate(("alice", "bob"))]
    asyncio.run(keys.revoke(records[0].id))
    assert {(key.id, key.tenant, bool(key.revoked_at)) for key in asyncio.run(keys.listed())} == {
        (records[0].id, "alice", True), (records[1].id, "bob", False),
    }  # fmt: skip


def test_a_key_is_revoked_once_and_for_good() -> None:
    now = [1000.0]
    keys = Keys(MemoryStore(), lambda: now[0])
    record = made(keys)[1]
    assert asyncio.run(keys.revoke(record.id)).revoked_at == 1000.0
    now[0] = 2000.0
    assert asyncio.run(keys.revoke(record.id)).revoked_at == 1000.0


@pytest.mark.parametrize("key_id", ["", "0123456789ab", "../../x", "0123456789AB", "keys/x"])
def test_a_key_that_does_not_exist_cannot_be_revoked(keys: Keys, key_id: str) -> None:
    with pytest.raises(NotFound, match="knapper key list"):
        asyncio.run(keys.revoke(key_id))


def test_a_key_in_the_place_of_its_id_is_not_repeated(keys: Keys) -> None:
    key, _ = made(keys)
    with pytest.raises(UserError) as raised:
        asyncio.run(keys.revoke(key))
    assert key not in str(raised.value)


def test_a_note_is_short_and_one_line(keys: Keys) -> None:
    most = "x" * limits.key_note_chars_max
    assert made(keys, note=most)[1].note == most
    for note in (most + "x", "a\nb", "\x1b[31m"):
        with pytest.raises(InvalidField, match="note is"):
            made(keys, note=note, n=2)


# ---- how they are checked


class CountingStore(MemoryStore):
    """A store that counts what is read."""

    reads = 0

    async def get(self, name: str) -> bytes | None:
        self.reads += 1
        return await super().get(name)


def test_a_revoked_key_is_refused_within_a_second_and_a_good_one_costs_two_reads_a_second() -> None:
    store, clock = CountingStore(), Clock(0.0)
    keys = Keys(store, clock)
    key, record = made(keys)

    async def use() -> None:
        ring = Keyring(keys, clock)
        for _ in range(100):
            await asyncio.gather(*(ring.of_key(key) for _ in range(10)))
        assert store.reads == 2  # its record, and whether it was revoked
        clock.at += limits.key_fresh_s
        await asyncio.gather(*(ring.of_key(key) for _ in range(10)))
        assert store.reads == 3
        await keys.revoke(record.id)
        clock.at += 1.0
        for _ in range(3):
            with pytest.raises(Unauthorized, match="was revoked"):
                await ring.of_key(key)

    assert limits.key_fresh_s < 1.0
    asyncio.run(use())


@pytest.mark.parametrize("key", ["tml-local", "", "tml-", f"tml-{10:064X}", f"tml-{1:064x}0", f"tml-{2:064x}"])
def test_no_other_key_is_good(keys: Keys, key: str) -> None:
    made(keys)
    with pytest.raises(Unauthorized) as raised:
        asyncio.run(Keyring(keys, lambda: 0.0).of_key(key))
    assert not key or key not in str(raised.value)


def test_a_key_whose_hash_begins_alike_is_not_good(keys: Keys) -> None:
    """The id is the beginning of the hash; the rest of it counts too."""
    key, record = made(keys)
    altered = msgspec.structs.replace(record, sha256=record.sha256[:-1] + bytes([record.sha256[-1] ^ 1]))
    store = MemoryStore()
    asyncio.run(store.put_if_absent(f"keys/{record.id}/{ids.number(1)}", encode(altered)))
    with pytest.raises(Unauthorized):
        asyncio.run(Keyring(Keys(store, lambda: 0.0), lambda: 0.0).of_key(key))


def test_a_check_that_fails_after_its_request_was_cancelled_logs_no_lost_exception() -> None:
    class Failing(MemoryStore):
        """Reads of revocations fail, once they may."""

        def __init__(self) -> None:
            super().__init__()
            self.reached, self.may_fail = asyncio.Event(), asyncio.Event()

        async def get(self, name: str) -> bytes | None:
            if name.endswith(ids.number(2)):
                self.reached.set()
                await self.may_fail.wait()
                raise StoreError(f"cannot read {name}: out of order")
            return await super().get(name)

    async def story() -> None:
        lost: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))
        store = Failing()
        keys = Keys(store, lambda: 0.0)
        key, _ = await keys.create(ALICE, "", lambda: f"{1:064x}")
        keyring = Keyring(keys, lambda: 0.0)
        request = asyncio.create_task(keyring.of_key(key))
        await store.reached.wait()
        request.cancel()
        assert isinstance((await asyncio.gather(request, return_exceptions=True))[0], asyncio.CancelledError)
        store.may_fail.set()
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()
        assert lost == []
        with pytest.raises(StoreError, match="out of order"):
            await keyring.of_key(key)  # by a check of its own

    asyncio.run(story())


# ---- through the gateway


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def running(clock: Clock) -> Iterator[Running]:
    with gateway(keys=True, jwt=True, clock=clock, monotonic=clock) as running:
        yield running


def create(running: Running, tenant: str = "alice", n: int = 1, note: str = "") -> tuple[str, Key]:
    created: tuple[str, Key] = running.run(
        Keys(running.store, running.parts.clock).create(Tenant(tenant), note, lambda: f"{n:064x}")
    )
    return created


def ask(running: Running, key: str, method: str = "GET", path: str = "get_server_capabilities") -> httpx.Response:
    return running.http.request(method, path, headers={"X-API-Key": key}, json={} if method == "POST" else None)


def test_a_key_says_whose_it_is(running: Running) -> None:
    key, record = create(running, note="laptop")
    description = ask(running, key, path="auth/apikey/me").json()
    assert description == {
        "key_id": int(record.id, 16), "name": record.id, "note": "laptop",
        "details": {"org_details": {"name": "alice"}, "user_details": {"email": "alice"}},
    }  # fmt: skip


def test_a_key_can_end_itself(running: Running) -> None:
    (key, record), (other, _) = create(running), create(running, n=2)
    assert ask(running, key, "DELETE", "auth/apikey/me").status_code == 200
    assert ask(running, key).status_code == 401
    assert ask(running, other).status_code == 200
    [entry] = ask(running, other, path="audit").json()["entries"]
    assert (entry["event"], entry["event_details"]) == ("key_revoke", {"actor": "alice", "key_id": record.id})
    assert running.run(Keys(running.store, lambda: 0.0).is_revoked(record.id)), "other gateways must refuse it too"


def test_a_token_dies_with_its_key(running: Running, clock: Clock) -> None:
    key, record = create(running)
    token = ask(running, key, "POST", "auth/token").json()["jwt"]
    assert ask(running, token, path="auth/apikey/me").json()["name"] == record.id
    assert ask(running, token, "DELETE", "auth/apikey/me").status_code == 401, "a token must not end its key"
    running.run(Keys(running.store, clock).revoke(record.id))
    clock.at += 1.0
    refused = ask(running, token)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert "WWW-Authenticate" not in refused.headers, "the SDK would try to exchange the revoked key"


def test_a_token_from_before_keys_were_on_is_exchanged_anew(running: Running, clock: Clock) -> None:
    tokens = running.run(AccessTokens.open(running.store, clock, lambda: "ab" * 16))
    refused = ask(running, tokens.issue(Tenant("alice"), ""))
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_token")


def test_a_token_of_a_tenant_opens_nothing_of_it_once_keys_are_off(running: Running) -> None:
    key, _ = create(running)
    token = ask(running, key, "POST", "auth/token").json()["jwt"]
    with gateway(running.store, model=None, jwt=True, clock=running.parts.clock) as other:
        assert ask(other, token, path="auth/apikey/me").json()["name"] == "local"


def test_a_store_that_fails_lets_nobody_in(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = create(running)

    async def fail(name: str) -> bytes | None:
        raise StoreError(f"cannot read {name}: out of order")

    monkeypatch.setattr(running.store, "get", fail)
    assert ask(running, key).status_code == 503


class Elsewhere:
    """The app as a client of another machine reaches it."""

    def __init__(self, running: Running, host: str) -> None:
        self._transport = httpx.ASGITransport(running.app, client=(host, 40000))

    def ask(self, running: Running) -> httpx.Response:
        async def get() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://localhost") as client:
                headers = {"X-API-Key": "tml-local"}
                return await client.get("/api/v1/get_server_capabilities", headers=headers)

        response: httpx.Response = running.run(get())
        return response


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("127.9.9.9", 200), ("::1", 200), ("::ffff:127.0.0.1", 200), ("10.0.0.7", 401),
    ("fd00::7", 401), ("::ffff:10.0.0.7", 401), ("testclient", 401),
])  # fmt: skip
def test_without_keys_only_this_machine_is_answered(host: str, status: int) -> None:
    with gateway() as running:
        answer = Elsewhere(running, host).ask(running)
        assert answer.status_code == status
        assert status == 200 or "KNAPPER_KEYS=true" in answer.json()["detail"]


# ---- through the command line, and on the way to a log


def knapper(data: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KNAPPER_", "K_SERVICE"))}
    return command.knapper(*arguments, environment={**inherited, "KNAPPER_DATA": str(data), **environment})


@pytest.mark.parametrize("environment", [
    {"KNAPPER_HOST": "0.0.0.0"}, {"KNAPPER_HOST": "192.168.1.2"}, {"KNAPPER_HOST": "example.org"},
    {"KNAPPER_HOST": "::"}, {"K_SERVICE": "gateway"},
])  # fmt: skip
def test_without_keys_nothing_listens_beyond_this_machine(tmp_path: Path, environment: dict[str, str]) -> None:
    up = knapper(tmp_path / "data", "up", **environment)
    assert up.returncode == 1
    assert up.stderr.startswith("knapper: KNAPPER_HOST is ")
    assert "KNAPPER_KEYS=true" in up.stderr
    assert "knapper key create" in up.stderr
    own = subprocess.run(
        [sys.executable, "-c", "from gateway.app import app"],
        env={**os.environ, "KNAPPER_DATA": str(tmp_path / "data"), **environment}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert own.returncode == 1
    assert "KNAPPER_KEYS=true" in own.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_keys_and_keys_allow_any_host(host: str) -> None:
    Settings.load({"KNAPPER_HOST": host}).expect_keys_beyond_loopback()
    Settings.load({"KNAPPER_HOST": "0.0.0.0", "KNAPPER_KEYS": "true"}).expect_keys_beyond_loopback()


def test_no_log_line_and_no_answer_repeats_a_key(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals, bad input, a failing store and a defect, each with the key in the request."""
    caplog.set_level(logging.DEBUG)
    key, _ = create(running)
    wrong = f"tml-{7:064x}"
    with structlog.testing.capture_logs() as lines:
        texts = [
            ask(running, wrong), ask(running, wrong, "POST", "create_session"), ask(running, key, "POST", "get_info"),
            ask(running, key, path="nowhere"), ask(running, key, path="training_runs/x"),
        ]  # fmt: skip
        token = ask(running, key, "POST", "auth/token").json()["jwt"]

        async def defect(prefix: str, start_after: str = "", limit: int = 0) -> list[str]:
            raise RuntimeError("a defect")

        monkeypatch.setattr(running.store, "list", defect)
        for each in (key, token):  # uvicorn ends the connection that a defect came by
            headers = {"X-API-Key": each, "Connection": "close"}
            texts.append(running.http.get("get_server_capabilities", headers=headers))
    assert [answer.status_code for answer in texts] == [401, 401, 422, 404, 404, 500, 500]
    written = "\n".join(map(str, lines)) + caplog.text + "".join(answer.text for answer in texts)
    assert "a defect" in written
    for secret in (key, wrong, token):
        assert secret not in written
