"""Captured episodes in the store: kept in order, bounded, in pages, deleted whole, and gone after a month."""

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from knapper import limits
from knapper.errors import InvalidField, NotFound
from knapper.ids import EpisodeName, Tenant
from knapper.state.captures import Captures
from knapper.store.memory import MemoryStore
from tests.gateway.captured import captured_turn

MINE, THEIRS = Tenant("one"), Tenant("two")
NAME = EpisodeName("group", "a")
FIELD = "X-Knapper-Capture"
T = TypeVar("T")


class Kept:
    """Episodes in a store of their own, by a clock that goes on by a second each time it is read."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.now = 1_800_000_000.0
        numbers = itertools.count()
        self.captures = Captures(self.store, self._clock, lambda: f"{next(numbers):032x}")

    def _clock(self) -> float:
        self.now += 1
        return self.now

    def keep(self, name: EpisodeName = NAME, tenant: Tenant = MINE, **turn: Any) -> str:
        return run(self.captures.keep(tenant, name, captured_turn(**turn)))

    def admit(self, name: EpisodeName = NAME) -> None:
        run(self.captures.admit(MINE, name, FIELD))

    def names(self) -> list[str]:
        return run(self.store.list(""))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_turns_come_back_as_they_were_in_pages_and_in_their_order(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [kept.keep(prompt=[n + 1] * 50, answer=[n, n]) for n in range(5)]
    page = run(kept.captures.turns(MINE, NAME, "", 2))
    assert [each.id for each in page.turns] == ids[:2]
    assert page.turns[1].turn == captured_turn([2] * 50, [1, 1])
    rest = run(kept.captures.turns(MINE, NAME, page.next or "", 3))
    assert ([each.id for each in rest.turns], rest.next) == (ids[2:], None)
    monkeypatch.setattr(limits, "turns_listed_bytes_max", 10)  # a page has one turn at least
    narrow = run(kept.captures.turns(MINE, NAME, "", 3))
    assert ([each.id for each in narrow.turns], narrow.next) == (ids[:1], ids[0])


def test_an_episode_is_one_tenants(kept: Kept) -> None:
    kept.keep()
    assert list(run(kept.captures.begun(THEIRS))) == []
    for asked in (kept.captures.turns(THEIRS, NAME, "", 1), kept.captures.set_score(THEIRS, NAME, 1.0)):
        with pytest.raises(NotFound, match="group/a"):
            run(asked)
    with pytest.raises(NotFound):
        run(kept.captures.turns(MINE, EpisodeName("", "a"), "", 1))


def test_a_limit_is_met_exactly_and_says_what_to_do(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "episode_turns_max", 2)
    for _ in range(2):
        kept.admit()
        kept.keep()
    with pytest.raises(InvalidField, match=r"fewer than 2 turns.*Begin another") as refused:
        kept.admit()
    assert refused.value.field == FIELD
    monkeypatch.setattr(limits, "episode_turns_max", 9)
    size = run(kept.captures.described(MINE, {NAME: 0.0}))[0].bytes
    assert size == sum(len(run(kept.store.get(name)) or b"") for name in kept.names() if "/turns/" in name)
    monkeypatch.setattr(limits, "episode_bytes_max", size + 1)
    kept.admit()
    monkeypatch.setattr(limits, "episode_bytes_max", size)
    with pytest.raises(InvalidField, match=f"fewer than {size} bytes"):
        kept.admit()
    monkeypatch.setattr(limits, "episode_bytes_max", size + 1)
    monkeypatch.setattr(limits, "episodes_max", 1)
    with pytest.raises(InvalidField, match="knapper capture delete"):
        kept.admit(EpisodeName("", "another"))
    kept.admit()
    monkeypatch.setattr(limits, "episodes_max", 2)
    kept.admit(EpisodeName("", "another"))


def test_the_newest_score_counts(kept: Kept) -> None:
    kept.keep()
    assert run(kept.captures.score(MINE, NAME)) is None
    for score in (1.0, -0.5):
        run(kept.captures.set_score(MINE, NAME, score))
        assert run(kept.captures.score(MINE, NAME)) == score
    assert len([name for name in kept.names() if "/scores/" in name]) == 1


def test_a_deleted_episode_leaves_nothing_and_its_name_is_free(kept: Kept) -> None:
    for name in (NAME, EpisodeName("", "a"), EpisodeName("group", "ab")):
        kept.keep(name)
    run(kept.captures.set_score(MINE, NAME, 1.0))
    assert run(kept.captures.delete(MINE, NAME)) == 1
    assert not [name for name in kept.names() if "/group/a/" in name or name.endswith("/group/a")]
    assert list(map(str, run(kept.captures.begun(MINE)))) == ["a", "group/ab"]
    kept.keep()
    assert list(map(str, run(kept.captures.begun(MINE)))) == ["a", "group/ab", "group/a"]


def test_an_episode_is_deleted_once_it_is_too_old(kept: Kept) -> None:
    kept.keep()
    kept.keep(EpisodeName("", "later"), THEIRS)
    began = run(kept.captures.begun(MINE))[NAME]
    kept.now = began + limits.episode_s - 1
    assert run(kept.captures.expire()) == 0
    assert run(kept.captures.expire()) == 1
    assert run(kept.captures.begun(MINE)) == {}
    assert all("/two/" in name for name in kept.names())
