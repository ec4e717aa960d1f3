"""What runs have used, as lines of account: names without content, so that one listing tells all of a time.

A line, <next>-<out>-<tokens>-<device seconds>, is the run's whole use in that hour, of its operations below `next`
and its records up to `out`. The highest wins: a line is written anew with more in it, never added to another, so that
nothing is ever counted twice.
"""

from dataclasses import dataclass

from knapper.ids import RunId, number
from knapper.state import damage
from knapper.state.layout import ObjectKind
from knapper.state.usage import Window, names_within
from knapper.store import Store


@dataclass(frozen=True, order=True)
class Through:
    """How far a run's use is accounted for: operations below `next`, all of them answered in records up to `out`."""

    next: int = 0
    out: int = 0

    def __str__(self) -> str:
        return f"{number(self.next)}-{number(self.out)}"

    @staticmethod
    def parse(text: str) -> "Through":
        return Through(*map(int, text.split("-")))


@dataclass(frozen=True)
class LedgerEntry:
    """`tokens` of forward passes that were accepted in the hour, `device_s` of what was answered in it."""

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
    _, hour, run, told = ObjectKind.LEDGER_LINE.parse(name)
    next_, out, tokens, device_s = told.split("-", 3)
    return LedgerEntry(int(hour), RunId(run), Through(int(next_), int(out)), int(tokens), float(device_s))


async def within(store: Store, tenant: str, window: Window) -> dict[tuple[int, RunId], LedgerEntry]:
    """The lines of the window, by hour and run. Nothing is read."""
    found = damage.parsed(await names_within(store, ObjectKind.LEDGER_LINE.under(tenant), window), _parse)
    return {(line.hour, line.run): line for line in found}  # in order: the highest of an hour and run stays


async def of_run(store: Store, tenant: str, hour: int, run: RunId) -> LedgerEntry:
    """The line as it stands."""
    listed = await store.list(_of_run(tenant, hour, run))
    return _parse(listed[-1]) if listed else LedgerEntry(hour, run, Through())


async def write(store: Store, tenant: str, line: LedgerEntry) -> None:
    """In the place of those that say less."""
    name = line.name(tenant)
    await store.put_if_absent(name, b"")
    for listed in await store.list(_of_run(tenant, line.hour, line.run)):
        if listed < name and _parse(listed).through != line.through:
            await store.delete(listed)
