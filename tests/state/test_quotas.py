"""Quotas in the store: what a tenant may have, how people write it, and which version is in force."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from knapper.errors import InvalidField, StoreError, UserError
from knapper.jobs import quota_file
from knapper.jobs.quota_file import QuotaFile
from knapper.state import quotas
from knapper.state.layout import ObjectKind
from knapper.state.quotas import Quota, QuotaBook, Quotas
from knapper.store.memory import MemoryStore
from tests.state.damage import flips

FILE = """
default: {runs: 5, rank: 32}
tenants:
  alice: {runs: 20, bytes: 50GiB, tokens_a_day: 10M, samples_in_flight: 64, rank: unlimited}
  bob-2:
    tokens_a_day: 2.5k
"""
PARSED = Quotas(
    default={"runs": 5, "rank": 32},
    tenants={
        "alice": {
            "runs": 20, "bytes": 50 * 2**30, "tokens_a_day": 10**7, "samples_in_flight": 64, "rank": None,
        },
        "bob-2": {"tokens_a_day": 2500},
    },
)  # fmt: skip


def book(store: MemoryStore | None = None) -> QuotaBook:
    return QuotaBook(store or MemoryStore(), lambda: 0.0)


def test_a_tenants_own_value_goes_before_the_default_field_by_field() -> None:
    assert PARSED.of("alice") == Quota(20, 50 * 2**30, 10**7, 64, None)
    assert PARSED.of("bob-2") == Quota(runs=5, tokens_a_day=2500, rank=32)
    assert PARSED.of("carol") == Quota(runs=5, rank=32)
    assert Quotas().of("alice") == Quota()
    assert PARSED.without("alice").of("alice") == PARSED.of("carol")
    assert PARSED.without("").of("bob-2") == Quota(tokens_a_day=2500)
    assert PARSED.changed("alice", {"runs": 0}).of("alice") == Quota(0, 50 * 2**30, 10**7, 64, None)


@pytest.mark.parametrize(
    ("field", "text", "number"),
    [
        ("runs", "20", 20), ("runs", 0, 0), ("tokens_a_day", "10M", 10**7), ("tokens_a_day", "1.5k", 1500),
        ("tokens_a_day", "2 G", 2 * 10**9), ("tokens_a_day", "10m", 10**7), ("bytes", "50GiB", 50 * 2**30),
        ("bytes", "50gib", 50 * 2**30), ("bytes", "50GB", 50 * 10**9), ("bytes", "0.5KiB", 512), ("bytes", 7, 7),
        ("rank", "256", 256), ("rank", "unlimited", None), ("runs", None, None), ("runs", 10**17, 10**17),
    ],
)  # fmt: skip
def test_values_are_written_as_people_write_them(field: str, text: object, number: int | None) -> None:
    assert quotas.value(field, text) == number


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("runs", "-1", "runs is '-1'; allowed: a whole number from 0 to 100000000000000000 or unlimited"),
        ("runs", -1, "runs is -1; allowed: a whole number from 0 to"),
        ("runs", True, "runs is True; allowed: a whole number"),
        ("runs", 1.0, "runs is 1.0; allowed: a whole number"),
        ("runs", "", "runs is ''; allowed: a whole number"),
        ("runs", "1e3", "runs is '1e3'; allowed: a whole number"),
        ("runs", 10**17 + 1, "runs is 100000000000000001; allowed: a whole number from 0 to 100000000000000000"),
        ("runs", "9" * 10_000, "runs is '9999"),
        ("rank", "257", "rank is '257'; allowed: a whole number from 1 to 256 or unlimited"),
        ("rank", 0, "rank is 0; allowed: a whole number from 1 to 256"),
        ("tokens_a_day", "1.0005k", "tokens_a_day is '1.0005k'; allowed: a whole number from 0 to"),
        ("tokens_a_day", "10GiB", "tokens_a_day is '10GiB'; allowed: a whole number .*, such as 10M, or unlimited"),
        ("bytes", "50 apples", "bytes is '50 apples'; allowed: a whole number .*, such as 50GiB, or unlimited"),
        ("tokens", 1, "tokens is 1; allowed: no field of this name, only runs, bytes, tokens_a_day, samples_in_f"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_the_field_and_what_is_allowed(field: str, given: object, message: str) -> None:
    with pytest.raises(InvalidField, match=f"^{message}"):
        quotas.value(field, given)


def test_a_file_is_yaml_or_json() -> None:
    assert quota_file.parse(Path("q.yaml"), FILE.encode()) == PARSED
    as_json = {"default": PARSED.default, "tenants": PARSED.tenants}
    assert quota_file.parse(Path("q.json"), json.dumps(as_json, indent=2).encode()) == PARSED
    assert quota_file.parse(Path("q"), b"  \n") == Quotas()
    assert quota_file.parse(Path("q"), b"default:\ntenants: {a: }\n") == Quotas(tenants={"a": {}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("default: {runs: 5}\nrun: 7\n", "q.yaml, line 2: run is 7; allowed: no field of this name, only default, ten"),
        ("tenants:\n  a:\n    runs: many\n", "q.yaml, line 3: tenants.a.runs is 'many'; allowed: a whole number"),
        ("tenants:\n  a:\n    bits: 1\n", "q.yaml, line 3: tenants.a.bits is 1; allowed: no field of this name"),
        ("tenants: {Alice: {runs: 1}}\n", "q.yaml, line 1: tenant is 'Alice'; allowed: 1 to 63 small letters"),
        ("tenants: [1]\n", "q.yaml, line 1: tenants is [1]; allowed: fields with values"),
        ("default: 7\n", "q.yaml, line 1: default is 7; allowed: fields with values"),
        ("runs: &a 5\nbytes: *a\n", "q.yaml, line 1: an anchor or alias is 'a'; allowed: plain values"),
        ("tenants: {a: {runs: 1, runs: 2}}\n", "q.yaml, line 1: tenants.a.runs is 'there a second time'; allowed: eac"),
        ("tenants: {\n", "q.yaml, line 2: invalid YAML"),
    ],
)
def test_a_wrong_file_names_the_line(content: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        quota_file.parse(Path("q.yaml"), content.encode())
    assert str(refused.value).startswith(message)


def test_a_change_is_a_new_version_and_no_change_is_none() -> None:
    async def story() -> None:
        store = MemoryStore()
        here, there = book(store), book(store)
        await here.change(lambda newest: newest.changed("a", {"runs": 1}))
        await there.change(lambda newest: newest.changed("b", {"runs": 2}))
        assert await here.newest() == Quotas(tenants={"a": {"runs": 1}, "b": {"runs": 2}})
        await here.change(lambda newest: newest.changed("b", {"runs": 2}))
        assert await store.list("quotas/") == [ObjectKind.QUOTAS.key(n) for n in (1, 2)]

    asyncio.run(story())


def test_changes_at_the_same_moment_are_all_kept() -> None:
    async def story() -> None:
        store = MemoryStore()

        async def change(n: int) -> None:
            await book(store).change(lambda newest: newest.changed(f"t{n}", {"runs": n}))

        await asyncio.gather(*map(change, range(20)))
        assert (await book(store).newest()).tenants == {f"t{n}": {"runs": n} for n in range(20)}

    asyncio.run(story())


def test_what_is_remembered_is_five_seconds_old_at_most() -> None:
    async def story() -> None:
        store, now = MemoryStore(), [0.0]
        here = QuotaBook(store, lambda: now[0])
        assert await here.of("a") == Quota()
        await book(store).change(lambda newest: newest.changed("a", {"runs": 1}))
        now[0] = 4.9
        assert await here.of("a") == Quota()
        now[0] = 5.0
        assert await here.of("a") == Quota(runs=1)

    asyncio.run(story())


def test_a_store_that_fails_leaves_in_force_what_was_read_and_nothing_else() -> None:
    class Failing(MemoryStore):
        fails = False

        async def get(self, name: str) -> bytes | None:
            if self.fails:
                raise StoreError("it fails")
            return await super().get(name)

    async def story() -> None:
        store, now = Failing(), [0.0]
        await book(store).change(lambda newest: newest.changed("a", {"runs": 1}))
        here = QuotaBook(store, lambda: now[0])
        assert await here.of("a") == Quota(runs=1)
        store.fails, now[0] = True, 60.0
        assert await here.of("a") == Quota(runs=1)
        with pytest.raises(StoreError):
            await book(store).of("a")

    asyncio.run(story())


def test_in_place_of_a_damaged_version_the_one_before_it_is_in_force() -> None:
    async def story() -> None:
        store = MemoryStore()
        here = book(store)
        for runs in (1, 2):
            await here.change(lambda newest, runs=runs: newest.changed("a", {"runs": runs}))  # type: ignore[misc]
        name = ObjectKind.QUOTAS.key(2)
        await flips.put(store, name, flips.flipped(await store.get(name) or b"", 300))
        assert (await book(store).newest()).of("a") == Quota(runs=1)
        await book(store).change(lambda newest: newest.changed("a", {"runs": 3}))
        assert (await book(store).newest()).of("a") == Quota(runs=3)

    asyncio.run(story())


def test_the_file_of_a_gateway_is_applied_when_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quotas.yaml"

    async def story() -> None:
        store = MemoryStore()
        here = book(store)
        file = QuotaFile(path, here)
        with pytest.raises(InvalidField, match=r"^KNAPPER_QUOTAS is '.*quotas.yaml'; allowed: a file that can be read"):
            await file.apply()
        path.write_text("tenants: {a: {runs: few}}")
        with pytest.raises(UserError, match=r"quotas.yaml, line 1: tenants.a.runs is 'few'"):
            await file.apply()
        path.write_text(FILE)
        assert await file.apply()
        assert await here.newest() == PARSED
        assert not await file.apply()
        path.write_text("tenants: {a: {runs: few}}")
        assert not await file.apply(), "a gateway that runs goes on with what it had"
        assert "those before it stay in force" in capsys.readouterr().out
        await here.change(lambda newest: newest.changed("a", {"runs": 1}))
        assert not await file.apply()
        assert (await here.newest()).of("a").runs == 1, "a command holds until the file changes"
        path.write_text("tenants: {a: {runs: 7}}")
        assert await file.apply()
        assert await here.newest() == Quotas(tenants={"a": {"runs": 7}})
        assert not await QuotaFile(path, book(store)).apply(), "another gateway writes no second version"
        assert len(await store.list("quotas/")) == 3

    asyncio.run(story())


def test_unknown_fields_of_a_later_release_are_no_defect() -> None:
    stored: dict[str, dict[str, Any]] = {"a": {"runs": 1, "gpus": 2}}
    assert Quotas(tenants=stored).of("a") == Quota(runs=1)
