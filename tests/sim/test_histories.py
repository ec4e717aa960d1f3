"""Thousands of seeded histories of the real journal under kills, lost answers, zombies and rivals.

One seed, one history.

Replay one:  python -m tests.sim.test_histories SEED
"""

import sys
from typing import Any

import pytest

from knapper.journal.run import Run
from tests.sim.history import play
from tests.sim.world import World

KILLS_MIN = 10_000


def test_ten_thousand_kills_lose_and_double_nothing() -> None:
    kills = errors = seed = 0
    while kills < KILLS_MIN:
        world = play(seed, faults=50)
        kills, errors, seed = kills + world.kills, errors + world.errors, seed + 1
    print(f"\n{seed} histories, {kills} kills, {errors} failed store calls: all states and answers as undisturbed")


class WithoutFence(Run[Any]):
    """Claims, and does not shut earlier holders out."""

    async def _fence(self) -> None:
        return None


class WithoutRollback(Run[Any]):
    """Keeps in memory what it applied and could not commit."""

    def _roll_back(self) -> None:
        return None


@pytest.mark.parametrize("broken", [WithoutFence, WithoutRollback])
def test_the_histories_turn_red_when_a_guard_is_taken_out(broken: type[Run[Any]]) -> None:
    def red(seed: int) -> bool:
        try:
            play(seed, run_class=broken)
        except AssertionError:
            return True
        return False

    assert any(red(seed) for seed in range(100))


def test_one_seed_is_one_history() -> None:
    def fate(world: World) -> tuple[int, int, int, float]:
        return world.steps, world.kills, world.errors, world.now

    assert fate(play(11)) == fate(play(11))
    assert fate(play(11)) != fate(play(12))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        played = play(int(argument), faults=50)
        print(f"seed {argument}: fine after {played.kills} kills, {played.errors} failed calls, {played.steps} steps")
