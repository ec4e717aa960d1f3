"""Ledger entries: the usage of a run in an hour, as a name without content, so that one listing returns a whole period.

An entry, <next>-<out>-<tokens>-<device seconds>, has the run's total usage in that hour by operations below `next` and
records up to `out`. The highest wins: an entry is replaced by a larger one, never added to, so nothing counts twice.
"""

from dataclasses import dataclass

from knapper.ids import RunId, number
from knapper.state import damage
from knapper.state.layout import ObjectKind
from knapper.state.usage import Window, names_within
from knapper.store import Store


@dataclass(frozen=True, order=True)
class Through:
    """How far a run is accounted for: operations below `next`, whose results are in records up to `out`."""

    next: int = 0
    out: int = 0

    def __str__(self) -> str:
        return f"{number(self.next)}-{number(self.out)}"

    @staticmethod
    def parse(text: str) -> "Through":
        return Through(*map(int, text.split("-")))


@dataclass(frozen=True)
class LedgerEntry:
    """`tokens`: of forward passes accepted in the hour. `device_s`: of results committed in it."""

    hour: int
    run: RunId
    through: Through
    tokens: int = 0
    device_s: float = 0.0

    def name(self, tenant: str) -> str:
        return f"{_of_run(tenant, self.hour, self.run)}{self.through}-{self.tokens}-{self.device_s!r}"


def _of_run(tenant: str, hour: int, run: RunId) -> str:
    return ObjectKind.LEDGER_LINE.under(tenant, hour, run)


def _parse(name: str) -> LedgerEntry:
    _, hour, run, entry = ObjectKind.LEDGER_LINE.parse(name)
    next_, out, tokens, device_s = entry.split("-", 3)
    return LedgerEntry(int(hour), RunId(run), Through(int(next_), int(out)), int(tokens), float(device_s))


async def within(store: Store, tenant: str, window: Window) -> dict[tuple[int, RunId], LedgerEntry]:
    """The entries of the window, by hour and run. Costs no reads."""
    entries = damage.parsed(await names_within(store, ObjectKind.LEDGER_LINE.under(tenant), window), _parse)
    return {(entry.hour, entry.run): entry for entry in entries}  # in order: the highest of an hour and run stays


async def of_run(store: Store, tenant: str, hour: int, run: RunId) -> LedgerEntry:
    """The newest entry."""
    names = await store.list(_of_run(tenant, hour, run))
    return _parse(names[-1]) if names else LedgerEntry(hour, run, Through())


async def write(store: Store, tenant: str, entry: LedgerEntry) -> None:
    """Replace the smaller entries of that hour and run."""
    name = entry.name(tenant)
    await store.put_if_absent(name, b"")
    for other in await store.list(_of_run(tenant, entry.hour, entry.run)):
        if other < name and _parse(other).through != entry.through:
            await store.delete(other)
