"""Small records of the store, cached. A record of another tenant looks like a missing one."""

from collections.abc import Callable

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

_OPEN_FRESH_S = 600.0  # heartbeats may miss for this long that another gateway finished their session
_PROJECT_FRESH_S = 600.0
_MODEL_FRESH_S = 5.0  # new requests may still get a model this long after it was taken out of service
_INFLIGHT_FRESH_S = 1.0  # a client may sample from superseded weights for this long
_INFLIGHT_RUNS_MAX = 4096


class InflightSamplers:
    """Samplers of kind inflight: those of a run share weights, and each new inflight save updates all of them.

    A sample takes the newest weights when it begins and keeps them to its end: two samples of one client may come from
    different weights, but all tokens of one sample come from the same. `now`: monotonic seconds.
    """

    def __init__(self, samplers: Samplers, now: Callable[[], float]) -> None:
        self._samplers = samplers
        self._now = now
        self._newest: LruCache[str, tuple[float, Sampler]] = LruCache(_INFLIGHT_RUNS_MAX)  # run -> (read at, sampler)

    async def serving(self, sampler: Sampler) -> Sampler:
        """The sampler whose weights are used now: the newest inflight one of the run, never older than `sampler`."""
        if sampler.kind != "inflight":
            return sampler
        read_at, newest = self._newest.known(sampler.run) or (float("-inf"), sampler)
        if newest.seq < sampler.seq:
            newest = sampler
        if self._now() - read_at < _INFLIGHT_FRESH_S:
            return newest
        newest = await self._samplers.inflight_after(sampler.run, newest.seq) or newest
        self._newest.keep(sampler.run, (self._now(), newest))
        return newest


class Lookups:
    """`on_sampler_use` is called for each sampler that a client uses or lists, `on_missing_model` when no model has a
    name. `now`: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        acceptor: Acceptor,
        now: Callable[[], float],
        on_sampler_use: Callable[[str], None],
        on_missing_model: Callable[[], None] = lambda: None,
    ) -> None:
        self.sessions = Sessions(store)
        self.samplers = Samplers(store)
        self.catalogue = Catalogue(store, on_missing_model)
        self.inflight = InflightSamplers(self.samplers, now)
        self._store = store
        self._acceptor = acceptor
        self._now = now
        self._on_sampler_use = on_sampler_use
        self._specs: LruCache[RunId, Spec] = LruCache()
        self._active: LruCache[RunId, bool] = LruCache()
        self._sampler: LruCache[tuple[SamplerId, Tenant], Sampler] = LruCache()
        self._session: LruCache[tuple[SessionId, Tenant], Session] = LruCache()
        self._open: LruCache[SessionId, float] = LruCache()
        self._projects: LruCache[SessionId, tuple[float, str]] = LruCache()
        self._active_days: LruCache[tuple[SessionId, int], None] = LruCache()
        self._accepted: LruCache[RunId, tuple[int, float]] = LruCache()
        self._models: dict[str, tuple[float, ModelRecord]] = {}

    async def spec(self, run: str, tenant: Tenant) -> Spec:
        """The spec of a run, ended or not. Raises NotFound."""
        run_id = ids.run_id(run)
        try:
            spec = await self.spec_of(run_id)
        except NotFound:
            end = await ends.ended(self._store, run_id)
            if end is not None and end.tenant == tenant:
                raise ends.refusal(run_id, end) from None
            raise
        if spec.tenant != tenant:
            raise _no_run(run)
        return spec

    async def active_spec(self, run: str, tenant: Tenant) -> Spec:
        """The spec of a run that has not ended. Raises NotFound; for a run that has ended, it says how."""
        spec = await self.spec(run, tenant)
        run_id = RunId(spec.run)
        if not self._active.known(run_id):
            if (end := await ends.ended(self._store, run_id)) is not None:
                raise ends.refusal(run_id, end)
            self._active.keep(run_id, True)
        return spec

    def forget_run(self, run: RunId) -> None:
        """Drop what is cached of a run that may have ended."""
        self._specs.forget(run)
        self._active.forget(run)

    async def spec_of(self, run: RunId) -> Spec:
        """The run's spec, whatever its tenant: for the gateway's own use. Raises NotFound."""
        return await self._specs.get(run, lambda: self._load_spec(run))

    async def sampler(self, sampler: str, tenant: Tenant) -> Sampler:
        """Raises NotFound."""
        sampler_id = ids.sampler_id(sampler)
        record = await self._sampler.get((sampler_id, tenant), lambda: self.samplers.get(sampler_id, tenant))
        self._on_sampler_use(sampler_id)  # only its own tenant's use of one that exists keeps its weights alive
        return record

    async def list_samplers(self, session: SessionId) -> list[SamplerId]:
        """The session's samplers. A client that lists them may use them next."""
        samplers = await self.samplers.of_session(session)
        for sampler in samplers:
            self._on_sampler_use(sampler)
        return samplers

    def forget_samplers(self) -> None:
        """Some may have been garbage-collected."""
        self._sampler = LruCache()

    async def session(self, session: str, tenant: Tenant) -> Session:
        """Raises NotFound."""
        session_id = ids.session_id(session)
        return await self._session.get((session_id, tenant), lambda: self.sessions.get(session_id, tenant))

    async def created_at(self, session: str, tenant: Tenant) -> float:
        """When the session was created, in seconds since the epoch; 0 if that cannot be read."""
        try:
            record = await damage.unless(self.session(session, tenant), None)
        except NotFound:
            return 0.0
        return 0.0 if record is None else record.created_at

    async def open_session(self, session: str, tenant: Tenant) -> Session:
        """Raises NotFound, or Gone once it has finished."""
        record = await self.session(session, tenant)
        if await self.sessions.finished(SessionId(record.session)) is not None:
            raise Gone(f"session {session} has finished; create another ServiceClient")
        return record

    async def heartbeat_session(self, session: str, tenant: Tenant) -> Session:
        """As `open_session`, for a heartbeat every ten seconds: reads from the store every ten minutes."""
        record = await self.session(session, tenant)
        checked_at = self._open.known(SessionId(record.session))
        if checked_at is None or self._now() - checked_at >= _OPEN_FRESH_S:
            await self.open_session(session, tenant)
            self._open.keep(SessionId(record.session), self._now())
        return record

    async def finish(self, session: SessionId, finish: Finish) -> None:
        """End the session; the first reason stays."""
        await self.sessions.finish(session, finish)
        self._open.forget(session)

    async def record_activity(self, session: SessionId, day: int) -> None:
        """Store that the session's client was alive on this day; written once a day."""
        await self._active_days.get((session, day), lambda: self.sessions.record_heartbeat(session, day))

    async def project(self, session: str, tenant: Tenant) -> str:
        """The session's project, empty for none. Another gateway's move may go unnoticed for ten minutes.

        Raises NotFound.
        """
        record = await self.session(session, tenant)
        cached = self._projects.known(SessionId(record.session))
        if cached is None or self._now() - cached[0] >= _PROJECT_FRESH_S:
            cached = self._now(), await self.sessions.project(record)
            self._projects.keep(SessionId(record.session), cached)
        return cached[1]

    async def assign(self, session: Session, project_id: str) -> None:
        """Move the session into the project."""
        await self.sessions.assign(SessionId(session.session), project_id)
        self._projects.forget(SessionId(session.session))

    async def last_request_at(self, run: RunId) -> float:
        """When the run's newest operation was accepted, in seconds since the epoch. Raises NotFound."""
        cached = self._accepted.known(run)
        name = await newest_name(self._store, layout.operations(run), after=cached[0] if cached else 0)
        if name:
            accepted_at = await damage.unless(self._load_accepted_at(name), None)
            if accepted_at is None:  # the time of creation is too early, but better than hiding the run
                return await self._load_accepted_at(layout.operation(run, 0))
            cached = layout.last_number(name), accepted_at
            self._accepted.keep(run, cached)
        if cached is None:
            raise _no_run(run)
        return cached[1]

    async def model(self, base_model: str) -> ModelRecord:
        """The served model of this name or directory. Raises NotFound, which lists the served models."""
        cached = self._models.get(base_model)
        if cached is not None and self._now() - cached[0] < _MODEL_FRESH_S:
            return cached[1]
        record = await self.catalogue.find(base_model)
        for name in (record.name, record.directory):
            self._models[name] = (self._now(), record)
        return record

    async def _load_accepted_at(self, name: str) -> float:
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
