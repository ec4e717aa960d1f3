"""Thousands of seeded histories of the real journal under kills, zombies, rivals and faults of the store.

One seed, one history.

Replay one:  python -m tests.sim.test_histories SEED
"""

import sys
from collections import Counter
from typing import Any

import pytest

from knapper.journal.run import Run
from tests.sim.history import play, played
from tests.sim.world import World
from tests.store.faulty import Rates

KILLS_MIN = 10_000
RATES = Rates.everywhere(0.003)


def test_ten_thousand_kills_lose_and_double_nothing() -> None:
    kills = errors = swept = takeovers = seed = 0
    met: Counter[str] = Counter()
    while kills < KILLS_MIN:
        history = played(seed, faults=50, rates=RATES)
        kills, errors, seed = kills + history.world.kills, errors + history.world.errors, seed + 1
        swept, takeovers, met = swept + history.swept, takeovers + history.takeovers, met + history.faulty.injected
    print(
        f"\n{seed} histories, {kills} kills, {takeovers} claims, {swept} sweeps between them, {errors} failed calls, "
        f"faults of the store {dict(met)}: all states and answers as undisturbed"
    )
    assert swept > seed / 4
    assert all(met[name] > 20 for name in RATES.__dataclass_fields__), met


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
            play(seed, run_class=broken, faults=50, rates=Rates.everywhere(0.01))
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
        world = play(int(argument), faults=50, rates=RATES)
        print(f"seed {argument}: fine after {world.kills} kills, {world.errors} failed calls, {world.steps} steps")
