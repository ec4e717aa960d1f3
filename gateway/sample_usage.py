"""The usage of samples in tokens and device seconds, counted as each is done.

It is stored once a minute and when the gateway stops. A gateway that is killed loses a minute of figures, no sample.
"""

from collections import Counter
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
    """The fields of a sample request that usage needs."""

    base_model: str
    prompt: msgspec.Raw  # a non-empty list of numbers, counted without decoding it


class SampleUsage:
    """`clock`: seconds since the epoch. `new_id`: random."""

    def __init__(self, store: Store, clock: Callable[[], float], new_id: Callable[[], str]) -> None:
        self._store = store
        self._clock = clock
        self._new_id = new_id
        self._counted: dict[tuple[Tenant, int], dict[tuple[str, str], Sampled]] = {}
        self._unwritten: dict[str, bytes] = {}
        self._tokens: Counter[Tenant] = Counter()

    def tokens(self, tenant: Tenant) -> int:
        """Tokens of all samples that this process has counted, prompts included."""
        return self._tokens[tenant]

    def count(self, tenant: Tenant, session: str, call: bytes, response: bytes, device_s: float) -> None:
        """Count a finished sample. `session`: empty for a sample of the OpenAI protocol, which has none."""
        try:
            request = msgspec.json.decode(call, type=_Call)
            sampled = scan.count_sampled(response)
        except (msgspec.MsgspecError, UserError) as error:
            log.error("a sample cannot be counted", reason=str(error))
            return
        hours = self._counted.setdefault((tenant, int(self._clock() // HOUR_S)), {})
        before = hours.get((session, request.base_model), Sampled(session=session, base_model=request.base_model))
        prompt = bytes(request.prompt).count(b",") + 1
        hours[session, request.base_model] = before.plus(prompt, sampled, device_s)
        self._tokens[tenant] += prompt + sampled

    async def flush(self) -> None:
        """Store all usage counted so far. A failed write is repeated the next time, under the same name."""
        for (tenant, hour), rows in self._counted.items():
            name = record_name(tenant, hour, self._new_id())
            self._unwritten[name] = encode(Samplings(rows=list(rows.values())))
        self._counted = {}
        for name, data in list(self._unwritten.items()):
            await self._store.put_if_absent(name, data)
            self._unwritten.pop(name, None)  # another flush may have written it meanwhile
