"""Seeded histories of the real journal under kills, zombies, rivals and faults of the store.

One seed, one history.

Replay one:  python -m tests.sim.test_histories SEED
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from knapper.errors import Corrupt
from knapper.ids import RunId
from knapper.state.gc import journal
from knapper.state.gc.lookups import SharedLookups
from knapper.state.gc.session import Visit
from knapper.state.journal.outbox import Outbox, Point, Publish
from knapper.state.journal.records import Commit, Manifest, Result
from knapper.state.journal.run import Run
from knapper.store import Store
from tests.sim.history import play, played
from tests.sim.world import World
from tests.store.faulty import Rates

RATES = Rates.everywhere(0.003)


@pytest.mark.parametrize("kills_min", [3000, pytest.param(10_000, marks=pytest.mark.long)])
def test_kills_at_any_store_call_lose_and_double_nothing(kills_min: int) -> None:
    kills = errors = collected = deletions = takeovers = seed = 0
    met: Counter[str] = Counter()
    ahead: Counter[int] = Counter()
    while kills < kills_min:
        history = played(seed, faults=50, rates=RATES)
        kills, errors, seed = kills + history.world.kills, errors + history.world.errors, seed + 1
        collected, deletions = collected + history.collected, deletions + history.deletions
        takeovers, met = takeovers + history.takeovers, met + history.faulty.injected
        ahead += history.lost_ahead
    print(
        f"\n{seed} histories, {kills} kills, {takeovers} claims, {deletions} objects collected in {collected} "
        f"looks between them, {errors} failed calls, "
        f"faults of the store {dict(met)}: all states and answers as undisturbed"
    )
    print(f"holders that died or were fenced with 0, 1, ... results ahead of their commits: {sorted(ahead.items())}")
    assert collected > seed / 2
    assert all(ahead[n] > kills / 500 for n in range(4)), ahead
    assert all(met[name] > kills / 500 for name in RATES.__dataclass_fields__), met


class WithoutFence(Run[Any]):
    """Claims, and does not shut earlier holders out."""

    async def _fence(self) -> None:
        return None


def red(seeds: int, run_class: type[Run[Any]] = Run) -> str:
    """What the first history that turns red says; empty if none does."""
    for seed in range(seeds):
        try:
            play(seed, run_class=run_class, faults=50, rates=Rates.everywhere(0.01))
        except (AssertionError, Corrupt) as error:
            return str(error)
    return ""


def test_the_histories_turn_red_without_the_fence() -> None:
    assert red(100, WithoutFence)


class Early(Outbox[Any]):
    """Tells of a commit before it is stored."""

    async def _store(self, storing: Any) -> None:
        await self._publish(storing.n, storing.commit)
        await super()._store(storing)


class Forgetful(Outbox[Any]):
    """Keeps in memory what it applied, and drops its results if they could not be stored."""

    async def open(self, publish: Publish) -> None:
        if self._error is not None:
            self._storing = None
        await super().open(publish)


class Repetitive(Outbox[Any]):
    """Stores results again in the next slot if it does not know whether it has stored them."""

    async def open(self, publish: Publish) -> None:
        if self._error is not None and self._storing is not None:
            self._storing = replace(self._storing, n=self._storing.n + 1)
        await super().open(publish)


class Hasty(Outbox[Any]):
    """Stores the next commit beside the one before it."""

    def _store_next(self) -> None:
        if self._error is None and self._due and self._results:
            beside = self._storing
            self._storing = self._cut()
            if beside is not None:
                self._storing = replace(self._storing, n=beside.n + 1)
            self._task = self._spawn(self._store(self._storing))


class Vain(Outbox[Any]):
    """Takes for durable what is only applied."""

    def add(self, result: Result, device_s: float, after: Point[Any]) -> None:
        super().add(result, device_s, after)
        self.durable = after


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Early, "was published before it was stored"),
        (Forgetful, "has the result of"),
        (Repetitive, "has the result of|no end"),
        (Hasty, "has the result of|is missing"),
        (Vain, "answers operation|no end"),  # no claim can recover from what it stored
    ],
)
def test_the_histories_turn_red_when_results_leave_otherwise_than_in_order(
    broken: type[Outbox[Any]], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knapper.state.journal.run.Outbox", broken)
    assert re.search(says, red(100)), "no history noticed"


_snapshots, _records, _commit = journal.snapshots, journal.records, journal._commit
_FENCE_AS_COMMIT = [Result(seq=0, sha256=b"", content_type="application/json", body=b"")]


async def keeps_one_snapshot(store: Store, run: RunId, manifest: Manifest) -> journal.Stored:
    return await _snapshots(store, run, msgspec.structs.replace(manifest, snapshot_before=""))


async def goes_up_to_the_newest(store: Store, run: RunId, manifest: Manifest, **more: Any) -> journal.CollectedRecords:
    further = msgspec.structs.replace(manifest, snapshot_before_out=manifest.snapshot_out)
    return await _records(store, run, further, **more)


async def takes_fences_for_answers(store: Store, name: str) -> Commit | None:
    commit = await _commit(store, name)
    return commit if commit is None or commit.results else msgspec.structs.replace(commit, results=_FENCE_AS_COMMIT)


async def nothing_is_held(_self: SharedLookups, _bundles: Iterable[str]) -> frozenset[str]:
    return frozenset()


def at_once(_self: Visit, _prefix: str) -> bool:
    return True


async def no_name_is_read(_self: Visit) -> None:
    return None


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"journal.snapshots": keeps_one_snapshot}, "is the spare|has no index"),
        ({"journal._is_dead": lambda _prefix, _manifest: True}, "its holder is storing it|recoveries start from it"),
        ({"journal.records": goes_up_to_the_newest}, "recoveries may replay"),
        ({"journal._commit": takes_fences_for_answers}, "is a fence"),
        (
            {"session.Visit._names": no_name_is_read, "lookups.SharedLookups.held": nothing_is_held},
            "leads to it|has no index",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_the_histories_turn_red_when_the_collector_deletes_what_is_needed(
    broken: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, instead in broken.items():
        monkeypatch.setattr(f"knapper.state.gc.{name}", instead)
    assert re.search(says, red(400)), "no history noticed"


def test_what_is_deleted_rests_on_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given a moment of grace, and all is well, as long as listings show what is there."""
    monkeypatch.setattr("knapper.state.gc.session.Visit._has_waited", at_once)
    rates = replace(Rates.everywhere(0.003), lag=0.0)
    deletions = sum(played(seed, faults=50, rates=rates).deletions for seed in range(60))
    assert deletions > 60 * 10


def test_one_seed_is_one_history() -> None:
    def fate(world: World) -> tuple[int, int, int, float]:
        return world.steps, world.kills, world.errors, world.now

    assert fate(play(11)) == fate(play(11))
    assert fate(play(11)) != fate(play(12))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        world = play(int(argument), faults=50, rates=RATES)
        print(f"seed {argument}: fine after {world.kills} kills, {world.errors} failed calls, {world.steps} steps")
