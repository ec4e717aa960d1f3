"""Shares are equal while keys wait, newcomers begin level, and no state is kept of keys that left."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from knapper.concurrency.fair_share import FairShare, Path


def served(shares: FairShare, waiting: Sequence[Path], cost: float = 1.0) -> Path:
    """Who was next, and is served once."""
    key = min(waiting, key=lambda each: shares.rank(*each))
    shares.serve(*key)
    shares.charge(cost, *key)
    return key


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_equal_by_cost_however_large_a_turn_is(seed: int) -> None:
    costs = random.Random(seed)
    shares, waiting = FairShare(), [("a",), ("b",), ("c",)]
    largest = {("a",): 1.0, ("b",): 7.0, ("c",): 30.0}
    spent = dict.fromkeys(waiting, 0.0)
    for key in waiting:
        shares.join(*key)
    for _ in range(3000):
        key = min(waiting, key=lambda each: shares.rank(*each))
        shares.serve(*key)
        cost = costs.uniform(0, largest[key])
        shares.charge(cost, *key)
        spent[key] += cost
    assert max(spent.values()) - min(spent.values()) <= 30.0


def test_tenants_share_equally_and_samplers_within_each() -> None:
    shares = FairShare()
    waiting = [("one", f"s{n}") for n in range(9)] + [("two", "s")]
    for key in waiting:
        shares.join(*key)
    turns = Counter(served(shares, waiting) for _ in range(180))
    assert turns["two", "s"] == 90
    assert [turns["one", f"s{n}"] for n in range(9)] == [10] * 9


def test_a_newcomer_begins_level_and_so_does_whoever_was_away() -> None:
    shares, old, new = FairShare(), ("old",), ("new",)
    shares.join(*old)
    for _ in range(100):
        served(shares, [old])
    shares.join(*new)
    assert [served(shares, [old, new]) for _ in range(6)] == [new, old] * 3
    shares.leave([old])  # the newcomer is away while the other goes on
    for _ in range(100):
        served(shares, [old])
    shares.join(*new)
    assert Counter(served(shares, [old, new]) for _ in range(10)) == {old: 5, new: 5}


def test_who_is_ahead_stays_so_over_a_short_absence() -> None:
    shares, greedy, other = FairShare(), ("greedy",), ("other",)
    shares.join(*greedy)
    shares.join(*other)
    shares.charge(5.0, *greedy)
    shares.leave([other])
    shares.join(*greedy)
    assert [served(shares, [greedy, other]) for _ in range(6)] == [other] * 5 + [greedy]


def test_nothing_is_kept_when_nobody_waits() -> None:
    shares = FairShare()
    for n in range(1000):
        shares.join("tenant", f"s{n}")
        served(shares, [("tenant", f"s{n}")])
        shares.leave([])
    assert (shares._times, shares._current) == ({}, {})
