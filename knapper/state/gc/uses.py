"""Which samplers are in use, by this gateway and by the others over the same store.

Each gateway knows what its own clients ask for. Where clients stay with one gateway, as HTTP/2 connections do, another
one must not delete what it never saw used: so each shows its uses in the store, a record a session. One that died
leaves its last record, which counts until the uses in it are too old to matter.
"""

from collections.abc import Callable
from typing import Final

from knapper.ids import SamplerId, SessionId, session_of
from knapper.state import damage
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store

SHOWN_AFTER: Final = 1 / 15  # of the retention: the others see a use this late, and an active session costs a put


class SamplersInUse(Record, frozen=True):
    """The last use of each sampler at one gateway, in seconds since the epoch."""

    used_at: dict[str, float]


class SamplerUses:
    """`gateway`: the random name of this process. `clock`: seconds since the epoch; `now`: monotonic seconds.

    A sampler may be deleted once it has not been used for `keep_s`. After a restart that time begins again.
    """

    def __init__(
        self, store: Store, gateway: str, keep_s: float, clock: Callable[[], float], now: Callable[[], float]
    ) -> None:
        self._store, self._gateway, self._keep_s = store, gateway, keep_s
        self._clock, self._now = clock, now
        self._seen_at: dict[SamplerId, float] = {}  # the last use here, or when it was first looked at
        self._served: dict[SessionId, dict[str, float]] = {}  # by the clock: what this gateway shows
        self._changed: set[SessionId] = set()  # not yet shown
        self._shown: dict[SessionId, tuple[str, float]] = {}  # the record, and when it was written

    def record(self, sampler: SamplerId) -> None:
        """A client uses the sampler, or lists it."""
        self._seen_at[sampler] = self._now()
        session = session_of(sampler)
        self._served.setdefault(session, {})[sampler] = self._clock()
        self._changed.add(session)

    def forget(self, sampler: SamplerId) -> None:
        """It is deleted."""
        self._seen_at.pop(sampler, None)
        self._served.get(session_of(sampler), {}).pop(sampler, None)

    def left_s(self, sampler: SamplerId) -> float:
        """How long it must still be unused here before it may go."""
        now = self._now()
        return self._seen_at.setdefault(sampler, now) + self._keep_s - now

    async def show(self) -> None:
        """Write what changed for the other gateways, and take back what is too old. Raises StoreError."""
        at = self._clock()
        for session in [*self._served]:
            uses = {sampler: used for sampler, used in self._served[session].items() if abs(at - used) < self._keep_s}
            before, written_at = self._shown.get(session, ("", float("-inf")))
            if not uses:
                del self._served[session]
                self._changed.discard(session)
                self._shown.pop(session, None)
            elif session in self._changed and abs(at - written_at) >= self._keep_s * SHOWN_AFTER:
                name = ObjectKind.SAMPLERS_IN_USE.key(session, int(at * 1e6), self._gateway)
                await self._store.put_if_absent(name, encode(SamplersInUse(used_at=uses)))
                self._served[session], self._shown[session] = uses, (name, at)
                self._changed.discard(session)
            else:
                continue
            if before:
                await self._store.delete(before)

    async def left_elsewhere(self, session: SessionId) -> dict[str, float]:
        """For each sampler that other gateways use: how long it must still be unused. Deletes what is too old.

        A record that is damaged stands for all samplers, by the key "". Raises StoreError.
        """
        left: dict[str, float] = {}
        for name in await self._store.list(ObjectKind.SAMPLERS_IN_USE.under(session)):
            _, at_us, gateway = ObjectKind.SAMPLERS_IN_USE.parse(name)
            if gateway == self._gateway or (data := await self._store.get(name)) is None:
                continue
            try:
                uses = decode(data, SamplersInUse, name).used_at
            except damage.ERRORS as error:
                damage.report(error)
                uses = {"": int(at_us) / 1e6}
            living = {sampler: self._keep_s - (self._clock() - used) for sampler, used in uses.items()}
            if all(left_s <= 0 for left_s in living.values()):
                await self._store.delete(name)
            for sampler, left_s in living.items():
                left[sampler] = max(left_s, left.get(sampler, 0.0))
        return left
