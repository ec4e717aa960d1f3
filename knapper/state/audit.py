"""The audit log of reads and changes. An entry is written before its action, so that no action lacks one."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from knapper.ids import TinkerPath
from knapper.state import damage
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store


class Entry(Record, frozen=True):
    """`event` is <resource>_<action>."""

    at: float  # seconds since the epoch
    event: str
    details: dict[str, str]


@dataclass(frozen=True)
class Audit:
    """`clock`: seconds since the epoch. `new_id`: random."""

    store: Store
    clock: Callable[[], float]
    new_id: Callable[[], str]

    async def write(self, tenant: str, event: str, **details: str) -> None:
        """Durable on return. Empty details are left out."""
        at = self.clock()
        entry = Entry(at=at, event=event, details={name: value for name, value in details.items() if value})
        name = ObjectKind.AUDIT.key(tenant, _date(datetime.fromtimestamp(at, UTC)), int(at * 1e6), self.new_id())
        await self.store.put_if_absent(name, encode(entry))

    async def read(self, tenant: str, tinker_path: str, purpose: str) -> None:
        """Note that the tenant is about to read a checkpoint, its own or a public one."""
        run = TinkerPath.parse(tinker_path).run
        await self.write(tenant, "checkpoint_read", tinker_path=tinker_path, model_id=run, purpose=purpose)

    async def day(self, tenant: str, day: datetime, resource: str = "") -> list[Entry]:
        """The entries of one UTC day in order of time: all, or those of one kind of resource."""
        names = await self.store.list(ObjectKind.AUDIT.under(tenant, _date(day)))
        entries = await damage.readable(names, self._read)
        return [entry for entry in entries if not resource or entry.event.startswith(f"{resource}_")]

    async def _read(self, name: str) -> Entry:
        data = await self.store.get(name)
        assert data is not None, "entries are never deleted"
        return decode(data, Entry, name)


def _date(day: datetime) -> str:
    return f"{day:%Y-%m-%d}"
