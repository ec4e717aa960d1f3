"""The alarms of runs, as they were raised: create-only records, so that any gateway may store the same one."""

from dataclasses import dataclass

from knapper.ids import RunId
from knapper.state import damage, layout
from knapper.state.journal.records import Alarm, decode, encode
from knapper.store import Store

_READ_MAX = 32


def shown(alarm: Alarm) -> dict[str, str | int | float]:
    """As clients see it. `at`: seconds since the epoch."""
    return {"name": alarm.name, "step": alarm.step, "message": alarm.message, "at": alarm.at}


@dataclass(frozen=True)
class Alarms:
    store: Store

    async def put(self, run: RunId, alarm: Alarm) -> None:
        await self.store.put_if_absent(layout.alarm(run, alarm.seq, alarm.name), encode(alarm))

    async def count(self, run: RunId) -> int:
        """How many the run has: names alone are read."""
        return len(await self.store.list(layout.alarms(run)))

    async def newest(self, run: RunId) -> list[Alarm]:
        """The run's newest alarms, newest first, without damaged ones."""
        names = (await self.store.list(layout.alarms(run)))[-_READ_MAX:]

        async def read(name: str) -> Alarm | None:
            data = await self.store.get(name)
            return None if data is None else decode(data, Alarm, name)

        return [alarm for alarm in reversed(await damage.readable(names, read)) if alarm is not None]
