"""What samples cost in tokens and in seconds of the device, counted as each is done.

It is written down once a minute and when the gateway stops. A gateway that is killed forgets what it counted since: a
minute of figures, and no sample.
"""

from collections.abc import Callable

import msgspec
import structlog

from knapper.errors import UserError
from knapper.ids import Tenant
from knapper.state.journal.records import encode
from knapper.state.usage import HOUR_S, Sampled, Samplings, record_name
from knapper.store import Store
from knapper.wire import scan

log = structlog.get_logger()


class _Call(msgspec.Struct):
    """What is read of a request to the sample function."""

    base_model: str
    prompt: msgspec.Raw  # a list of numbers, and not empty: nothing of it is built to count them


class Meter:
    """`clock`: seconds since the epoch. `new_id`: random."""

    def __init__(self, store: Store, clock: Callable[[], float], new_id: Callable[[], str]) -> None:
        self._store = store
        self._clock = clock
        self._new_id = new_id
        self._counted: dict[tuple[Tenant, int], dict[tuple[str, str], Sampled]] = {}
        self._unwritten: dict[str, bytes] = {}

    def count(self, tenant: Tenant, session: str, call: bytes, answer: bytes, device_s: float) -> None:
        """A sample is done. `session`: empty for one that belongs to none, as OpenAI's clients ask for them."""
        try:
            asked = msgspec.json.decode(call, type=_Call)
            sampled = scan.count_sampled(answer)
        except (msgspec.MsgspecError, UserError) as error:
            log.error("a sample cannot be counted", reason=str(error))
            return
        hours = self._counted.setdefault((tenant, int(self._clock() // HOUR_S)), {})
        before = hours.get((session, asked.base_model), Sampled(session=session, base_model=asked.base_model))
        hours[session, asked.base_model] = before.plus(bytes(asked.prompt).count(b",") + 1, sampled, device_s)

    async def flush(self) -> None:
        """Make all that was counted durable. What fails is kept, and goes under the same name the next time."""
        for (tenant, hour), rows in self._counted.items():
            name = record_name(tenant, hour, self._new_id())
            self._unwritten[name] = encode(Samplings(rows=list(rows.values())))
        self._counted = {}
        for name, data in list(self._unwritten.items()):
            await self._store.put_if_absent(name, data)
            del self._unwritten[name]
