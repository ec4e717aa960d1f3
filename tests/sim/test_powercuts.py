"""The power goes at any moment, and what was acknowledged or shown is there afterwards, once.

More of them:  make powercuts
Replay one:    python -m tests.sim.test_powercuts SEED
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knapper.errors import KnapperError
from knapper.store import directory
from knapper.store.directory import DirectoryStore
from tests.sim.powercuts import Tally, played

CUTS_MIN = int(os.environ.get("TEST_POWERCUTS", "150"))
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what was synced is found in /proc")


def test_no_power_cut_loses_what_was_acknowledged_or_shown() -> None:
    tally = Tally()
    while tally.cuts < CUTS_MIN:
        played(tally.histories, tally)
    print(f"\n{tally}: all states and answers as undisturbed")
    assert tally.dropped > tally.cuts / 25, "the power was never cut where it matters"
    assert tally.killed > tally.cuts / 4


def red(first: int) -> str:
    """What the first history from there on that turns red says; empty if none of eight does."""
    for seed in range(first, first + 8):
        try:
            played(seed, Tally())
        except (AssertionError, KnapperError) as error:
            return f"seed {seed}: {error}"
    return ""


_sync_directory = directory._sync_directory


def without_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(self: DirectoryStore, path: Path, data: bytes) -> bool:
        with monkeypatch.context() as within:
            synced = os.fsync
            within.setattr(os, "fsync", lambda of: None if Path(f"/proc/self/fd/{of}").is_file() else synced(of))
            return put(self, path, data)

    put = DirectoryStore._put
    monkeypatch.setattr(DirectoryStore, "_put", lazy)


def without_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_sync_directory", lambda _directory: None)


def without_that_of_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(_self: DirectoryStore, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(DirectoryStore, "_make_directory", make)


def without_that_of_directories_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: DirectoryStore, path: Path) -> None:
        while not path.is_dir():
            self._make_directory(path.parent)
            path.mkdir(exist_ok=True)
            _sync_directory(path.parent)

    monkeypatch.setattr(DirectoryStore, "_make_directory", make)


@pytest.mark.parametrize(
    ("broken", "first"),
    [
        (without_the_bytes, 0), (without_the_name, 0), (without_that_of_directories, 0),
        (without_that_of_directories_of_others, 11),  # one in fifteen histories needs it
    ],
)  # fmt: skip
def test_the_histories_turn_red_without_any_of_the_syncs(
    broken: Callable[[pytest.MonkeyPatch], None], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losers of a name and readers of half-done writes: tests/store/test_directory.py."""
    broken(monkeypatch)
    assert red(first), "no history noticed"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        tally = Tally()
        played(int(argument), tally)
        print(f"seed {argument}: fine; {tally}")
