"""Small records, read once and remembered; another tenant's answer as missing ones do."""

from collections.abc import Callable

from gateway.inflight_samplers import Inflight
from knapper import ids
from knapper.catalogue.served_models import Catalogue
from knapper.errors import Gone, NotFound
from knapper.ids import RunId, SamplerId, SessionId, Tenant
from knapper.state import damage, layout
from knapper.state.journal import ends
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.newest import newest_name
from knapper.state.journal.records import Operation, Spec, decode
from knapper.state.model_record import ModelRecord
from knapper.state.sessions import Finish, Sampler, Samplers, Session, Sessions
from knapper.store import Store
from knapper.store.cache import LruCache

_OPEN_FRESH_S = 600.0  # another gateway's word that a session has finished may reach its heartbeats so late
_PROJECT_FRESH_S = 600.0
_MODEL_FRESH_S = 5.0  # a model that is taken out of service is gone for new requests after this


class Records:
    """`asked` hears of each sampler that somebody uses or lists."""

    def __init__(
        self, store: Store, acceptor: Acceptor, now: Callable[[], float], asked: Callable[[str], None]
    ) -> None:
        self.sessions = Sessions(store)
        self.samplers = Samplers(store)
        self.catalogue = Catalogue(store)
        self.inflight = Inflight(self.samplers, now)
        self._store = store
        self._acceptor = acceptor
        self._now = now
        self._asked = asked
        self._specs: LruCache[RunId, Spec] = LruCache()
        self._living: LruCache[RunId, bool] = LruCache()
        self._sampler: LruCache[tuple[SamplerId, Tenant], Sampler] = LruCache()
        self._session: LruCache[tuple[SessionId, Tenant], Session] = LruCache()
        self._open: LruCache[SessionId, float] = LruCache()
        self._projects: LruCache[SessionId, tuple[float, str]] = LruCache()
        self._heard: LruCache[tuple[SessionId, int], None] = LruCache()
        self._accepted: LruCache[RunId, tuple[int, float]] = LruCache()
        self._models: dict[str, tuple[float, ModelRecord]] = {}

    async def spec(self, run: str, tenant: Tenant) -> Spec:
        """What the run is, or was. Raises NotFound."""
        checked = ids.run_id(run)
        try:
            spec = await self.spec_of(checked)
        except NotFound:
            end = await ends.ended(self._store, checked)
            if end is not None and end.tenant == tenant:
                raise ends.refusal(checked, end) from None
            raise
        if spec.tenant != tenant:
            raise _no_run(run)
        return spec

    async def living(self, run: str, tenant: Tenant) -> Spec:
        """As `spec`, of a run that goes on. Raises NotFound, which says how it ended if it has."""
        spec = await self.spec(run, tenant)
        checked = RunId(spec.run)
        if not self._living.known(checked):
            if (end := await ends.ended(self._store, checked)) is not None:
                raise ends.refusal(checked, end)
            self._living.keep(checked, True)
        return spec

    def forget_run(self, run: RunId) -> None:
        """It may be gone, or over: look anew."""
        self._specs.forget(run)
        self._living.forget(run)

    async def spec_of(self, run: RunId) -> Spec:
        """What the run is, whoever asks: for the gateway's own use. Raises NotFound."""
        return await self._specs.get(run, lambda: self._load_spec(run))

    async def sampler(self, sampler: str, tenant: Tenant) -> Sampler:
        """Raises NotFound."""
        checked = ids.sampler_id(sampler)
        found = await self._sampler.get((checked, tenant), lambda: self.samplers.get(checked, tenant))
        self._asked(checked)  # of what is there, and by its tenant: it stays for a while
        return found

    async def list_samplers(self, session: SessionId) -> list[SamplerId]:
        """Those of the session. Who lists them may use them next."""
        listed = await self.samplers.of_session(session)
        for sampler in listed:
            self._asked(sampler)
        return listed

    def forget_samplers(self) -> None:
        """Some may have been collected."""
        self._sampler = LruCache()

    async def session(self, session: str, tenant: Tenant) -> Session:
        """Raises NotFound."""
        checked = ids.session_id(session)
        return await self._session.get((checked, tenant), lambda: self.sessions.get(checked, tenant))

    async def open_session(self, session: str, tenant: Tenant) -> Session:
        """Raises NotFound, or Gone once it has finished."""
        record = await self.session(session, tenant)
        if await self.sessions.finished(SessionId(record.session)) is not None:
            raise Gone(f"session {session} has finished; create another ServiceClient")
        return record

    async def beating_session(self, session: str, tenant: Tenant) -> Session:
        """As `open_session`, for what comes every ten seconds: whether it has finished is asked every ten minutes."""
        record = await self.session(session, tenant)
        seen_at = self._open.known(SessionId(record.session))
        if seen_at is None or self._now() - seen_at >= _OPEN_FRESH_S:
            await self.open_session(session, tenant)
            self._open.keep(SessionId(record.session), self._now())
        return record

    async def finish(self, session: SessionId, finish: Finish) -> None:
        """End the session; the first reason stays."""
        await self.sessions.finish(session, finish)
        self._open.forget(session)

    async def hear(self, session: SessionId, day: int) -> None:
        """Remember for good that the session's client lived on this day; written once a day."""
        await self._heard.get((session, day), lambda: self.sessions.record_heartbeat(session, day))

    async def project(self, session: str, tenant: Tenant) -> str:
        """The project that the session is in, empty for none: another gateway's move may be missed for ten minutes.

        Raises NotFound.
        """
        record = await self.session(session, tenant)
        known = self._projects.known(SessionId(record.session))
        if known is None or self._now() - known[0] >= _PROJECT_FRESH_S:
            known = self._now(), await self.sessions.project(record)
            self._projects.keep(SessionId(record.session), known)
        return known[1]

    async def assign(self, session: Session, project_id: str) -> None:
        """Move the session into the project."""
        await self.sessions.assign(SessionId(session.session), project_id)
        self._projects.forget(SessionId(session.session))

    async def asked_at(self, run: RunId) -> float:
        """When the run's newest operation was accepted, in seconds since the epoch. Raises NotFound."""
        known = self._accepted.known(run)
        name = await newest_name(self._store, layout.operations(run), after=known[0] if known else 0)
        if name:
            at = await damage.unless(self._load_accepted(name), None)
            if at is None:  # that of its creation is less than is wanted, and better than no run at all
                return await self._load_accepted(layout.operation(run, 0))
            known = layout.last_number(name), at
            self._accepted.keep(run, known)
        if known is None:
            raise _no_run(run)
        return known[1]

    async def model(self, base_model: str) -> ModelRecord:
        """The served model of this name or directory. Raises NotFound, which lists what is served."""
        known = self._models.get(base_model)
        if known is not None and self._now() - known[0] < _MODEL_FRESH_S:
            return known[1]
        record = await self.catalogue.find(base_model)
        for known_as in (record.name, record.directory):
            self._models[known_as] = (self._now(), record)
        return record

    async def _load_accepted(self, name: str) -> float:
        data = await self._store.get(name)
        if data is None:
            raise NotFound(f"{name} was collected while it was being read; ask again")
        return decode(data, Operation, name).accepted_at

    async def _load_spec(self, run: RunId) -> Spec:
        creation = await self._acceptor.creation(run)
        if creation is None:
            raise _no_run(run)
        return creation.spec


def _no_run(run: str) -> NotFound:
    return NotFound(f"training run {run!r} does not exist; create one with create_lora_training_client")
