"""A bit flips in any object: it never reads as other content, hides no other object, and affects no other tenant.

All bits of all objects:  make flips
"""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from knapper.errors import Corrupt
from knapper.ids import Tenant
from knapper.state import inventory, layout
from knapper.state.inventory import Empty
from knapper.state.journal.records import Creation, Spec, Terms, decode, encode
from knapper.state.layout import ObjectKind
from knapper.state.secrets import Secret
from knapper.state.signed_links import Link
from knapper.store import Store
from knapper.store.memory import MemoryStore
from tests.golden import deployment, records
from tests.state.damage import flips
from tests.state.damage.tenants import TENANTS, Server, furnished

MOST = int(os.environ.get("TEST_FLIPS", "64"))  # bits of each object that is read whole; 0: all
HOURS = {"starting_on": "2027-01-15T00:00:00Z", "ending_before": "2027-01-16T00:00:00Z"}
LISTS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("GET", "training_runs", {}, "training_runs"),
    ("GET", "training_runs", {"params": {"project_id": "p"}}, "training_runs"),
    ("GET", "checkpoints", {}, "checkpoints"),
    ("POST", "checkpoints/search", {"json": {}}, "checkpoints"),
    ("GET", "sessions", {}, "sessions"),
    ("POST", "sessions/search", {"json": {}}, "sessions"),
    ("GET", "audit", {"params": {"day": "2027-01-15"}}, "entries"),
    ("GET", "billing/usage/events", {"params": HOURS}, "data"),
    ("GET", "jobs", {}, "jobs"),
)


@pytest.mark.parametrize("name", sorted(records.types()))
def test_no_bit_of_a_record_flips_into_another_record(name: str) -> None:
    kind = records.types()[name]
    data = encode(records.full(kind))
    for bit in flips.bits(data, name):
        with pytest.raises(Corrupt, match="object x is damaged") as raised:
            decode(flips.flipped(data, bit), kind, "x")
        assert raised.value.object_name == "x"


def test_every_kind_of_record_has_its_place_in_the_table() -> None:
    """So that a new kind is read, and checked, by `knapper verify`."""
    lie_in_others = {Spec, Terms, Creation, Link}
    listed = {holds for holds in inventory.TABLE.values() if isinstance(holds, type)} | {Secret}
    assert set(records.types().values()) - lie_in_others == listed


# Stores, which write what they are given.
PASS_ON = {
    "knapper/store/counted.py",
    "knapper/store/__init__.py",
    "knapper/store/directory.py",
    "knapper/store/gcs.py",
    "knapper/store/memory.py",
}


def test_whoever_writes_objects_is_known_here() -> None:
    """A module that begins to: add it, and what it writes, to the table in `knapper.state.layout`."""
    modules = {name for kind in ObjectKind for name in kind.writers.split(", ") if name}
    writers = {("" if name.startswith("gateway.") else "knapper/") + name.replace(".", "/") + ".py" for name in modules}
    found = set[str]()
    for folder in ("knapper", "gateway", "functions"):
        for path in Path(folder).rglob("*.py"):
            if "put_if_absent(" in path.read_text():
                found.add(str(path))
    assert found == writers | PASS_ON


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return furnished(MemoryStore(), tmp_path_factory.mktemp("exchange"))


def names_of(store: Store) -> list[str]:
    return asyncio.run(store.list(""))


def test_every_kind_of_object_is_there_to_be_damaged(server: Server) -> None:
    """And each name is of one kind."""
    names = [*names_of(server.store), *names_of(deployment.opened(sorted(deployment.FILES.iterdir())[-1])[0])]
    for kind, holds in inventory.TABLE.items():
        matching = [name for name in names if kind.matches(name)]
        assert matching or isinstance(holds, Empty), f"no object of {kind.pattern}"
    for name in names:
        assert len([kind for kind in ObjectKind if kind.matches(name)]) == 1, name


def test_a_sound_store_has_nothing_that_cannot_be_read(server: Server) -> None:
    for store in (server.store, *(deployment.opened(path)[0] for path in sorted(deployment.FILES.iterdir()))):
        assert asyncio.run(wrong(store)) == []


async def wrong(store: Store) -> list[str]:
    return [str(error) async for _, errors in inventory.unreadable(store) for error in errors]


def test_no_bit_of_any_object_flips_into_something_else(server: Server) -> None:
    """By the product's own readers. Objects in several parts are as strong as each of them."""
    checked = 0
    for original in (server.store, deployment.opened(sorted(deployment.FILES.iterdir())[-1])[0]):
        store = asyncio.run(flips.copied(original))
        checked += asyncio.run(flip_all(store))
    print(f"\n{checked} bits")
    assert checked > 3000


async def flip_all(store: Store) -> int:
    checked = 0
    for name in await store.list(""):
        data = await store.get(name) or b""
        for bit in flips.bits(data, name, MOST):
            await flips.put(store, name, flips.flipped(data, bit))
            error = await flips.error_of(store, name)
            assert isinstance(error, Corrupt), f"bit {bit} of {name} flips, and nobody notices"
            assert name in str(error), f"{name}: {error}"
            assert "operator" in str(error)
            checked += 1
        await flips.put(store, name, data)
    return checked


def test_one_damaged_object_hides_nothing_else_and_is_no_500(server: Server) -> None:
    draw = random.Random(5)
    before = {tenant: answers(server, tenant) for tenant in TENANTS}
    damaged = chosen(server.store)
    print(f"\n{len(damaged)} objects damaged, one at a time; {len(before[TENANTS[0]])} questions of each tenant")
    for name in damaged:
        data = asyncio.run(server.store.get(name)) or b""
        asyncio.run(flips.put(server.store, name, flips.flipped(data, draw.randrange(8 * len(data)))))
        try:
            for tenant in TENANTS:
                compare(name, owner_of(server, name), tenant, before[tenant], answers(server, tenant))
        finally:
            asyncio.run(flips.put(server.store, name, data))


def chosen(store: Store) -> list[str]:
    """Objects with bytes: all, or one of each kind, and of the secrets, whose uses differ, each."""
    names = [name for name in names_of(store) if not isinstance(inventory.holds(name), Empty)]
    if not MOST:
        return names
    secrets = [name for name in names if layout.kind_of(name) is ObjectKind.SECRET]
    return [*{layout.kind_of(name): name for name in names}.values(), *secrets]


def owner_of(server: Server, name: str) -> str:
    """The tenant whose object it is; empty for the server's own."""
    for tenant, made in server.made.items():
        if f"/{tenant}/" in name or any(session in name for session in made["sessions"]):
            return tenant
    return ""


def answers(server: Server, tenant: Tenant) -> dict[str, tuple[int, Any]]:
    """What a gateway that has just started tells the tenant: lists, and everything by its name."""
    made = server.made[tenant]
    single: list[tuple[str, str, dict[str, Any]]] = [
        *(("GET", f"sessions/{session}", {}) for session in made["sessions"]),
        *(("GET", f"training_runs/{run}", {}) for run in made["runs"]),
        *(("GET", f"training_runs/{run}/checkpoints", {}) for run in made["runs"]),
        *(("POST", "weights_info", {"json": {"tinker_path": f"tinker://{run}/weights/a"}}) for run in made["runs"]),
        *(("GET", f"jobs/{job}", {}) for job in made["jobs"]),
    ]
    body = {}
    with server.client() as client:
        for method, path, more in (*((method, path, more) for method, path, more, _ in LISTS), *single):
            reply = server.asked(client, tenant, method, path, **more)
            body[f"{method} {path} {more}"] = (reply.status_code, reply.json())
    return body


def compare(name: str, owner: str, tenant: Tenant, before: dict[str, Any], after: dict[str, Any]) -> None:
    of_key = name.startswith("keys/")
    for method, path, more, items in LISTS:
        asked = f"{method} {path} {more}"
        status, body = after[asked]
        where = f"{name} is damaged, and {tenant} asks {asked}: {status} {body}"
        if of_key and status != 200:
            assert (status, body["code"]) == (503, "corrupt"), where
            continue
        assert status == 200, where
        gone = len(before[asked][1][items]) - len(body[items])
        assert gone <= (2 if path.startswith("billing") else 1), f"{where}: {gone} are gone"
    for asked, (status, body) in after.items():
        assert status in (200, 404, 422) or (status, body.get("code")) == (503, "corrupt"), f"{name}: {asked}: {body}"
        if status == 503:
            assert "is damaged" in body["detail"], body
            assert "operator" in body["detail"], body
        if owner and owner != tenant:
            assert (status, body) == before[asked], f"{name} is of {owner}, and {tenant} notices"
        if status != 200 and before[asked][0] == 200:
            assert status == 503, f"{name} is damaged, and {asked} gets {body}"


def test_what_is_damaged_is_found_by_the_operator(server: Server, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from knapper.cli.main import app
    from knapper.store.directory import DirectoryStore

    store = DirectoryStore(tmp_path / "store")
    for name in names_of(server.store):
        asyncio.run(store.put_if_absent(name, asyncio.run(server.store.get(name)) or b""))
    sound = CliRunner().invoke(app, ["verify", "--data", str(tmp_path)])
    assert sound.exit_code == 0, sound.output
    assert f"{len(names_of(server.store))} objects read; none" in sound.output
    damaged = next(name for name in names_of(store) if name.startswith("sessions/"))
    path = tmp_path / "store" / damaged
    path.write_bytes(flips.flipped(path.read_bytes(), 99))
    found = CliRunner().invoke(app, ["verify", "--data", str(tmp_path)])
    assert found.exit_code == 1
    assert f"corrupt: object {damaged} is damaged" in found.output
