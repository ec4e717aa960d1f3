"""Open runs of a tenant: neither deleted nor ended with their session, and their client was heard of lately."""

from collections.abc import Callable

from knapper import limits
from knapper.ids import RunId, SessionId, Tenant, make_run_id
from knapper.state import damage
from knapper.state.layout import ObjectKind
from knapper.state.sessions import DAY_S
from knapper.store import Store, many
from knapper.store.cache import LruCache


class OpenRuns:
    """`clock`: seconds since the epoch."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._finished: LruCache[SessionId, bool] = LruCache()  # a session finishes once

    async def of(self, tenant: Tenant) -> list[RunId]:
        """One listing, and up to three reads for each session that is not known to have finished."""
        names = await self._store.list(ObjectKind.TENANT_RUN.under(tenant))
        runs = damage.parsed(names, _parse)
        sessions = list({session: created_at for session, created_at, _ in runs}.items())
        are_open = dict(
            zip([s for s, _ in sessions], await many.each(sessions, lambda s: self._is_open(*s)), strict=True)
        )
        return [run for session, _, run in runs if are_open[session]]

    async def _is_open(self, session: SessionId, created_at: float) -> bool:
        if not self._finished.known(session) and await self._store.get(ObjectKind.FINISH.key(session)) is not None:
            self._finished.keep(session, True)
        if self._finished.known(session):
            return False
        now = self._clock()
        if now - created_at < limits.quota_run_silent_s:
            return True
        for day in (int(now // DAY_S), int((now - limits.quota_run_silent_s) // DAY_S)):
            if await self._store.get(ObjectKind.HEARTBEAT.key(session, day)) is not None:
                return True
        return False


def _parse(name: str) -> tuple[SessionId, float, RunId]:
    """Raises ValueError for a malformed name."""
    _, created_us, session, n = ObjectKind.TENANT_RUN.parse(name)
    return SessionId(session), int(created_us) / 1e6, make_run_id(SessionId(session), int(n))
