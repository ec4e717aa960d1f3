"""Sessions and samplers: small create-only records of clients, and of the weights that their samplers use."""

from dataclasses import dataclass

from knapper import limits
from knapper.errors import NotFound, UserError
from knapper.ids import SamplerId, SessionId, number, session_of
from knapper.state import layout
from knapper.state.gc import marks
from knapper.state.journal.newest import newest_name, newest_of_few
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store, many

DAY_S = 24 * 3600.0


class Session(Record, frozen=True):
    """A session as its client created it."""

    session: str
    tenant: str
    created_at: float
    sdk_version: str = ""
    project_id: str = ""
    display_name: str = ""
    tags: list[str] = []
    user_metadata_json: str = "{}"


class Finish(Record, frozen=True):
    """Why the session ended; the first reason stays."""

    reason: str
    detail: str
    finished_at: float


class Assignment(Record, frozen=True):
    """The session's project; the highest n wins."""

    project_id: str


class Sampler(Record, frozen=True):
    """One sampling session. `bundle` is the store prefix of its adapter, empty for the base model."""

    sampler: str
    tenant: str
    base_model: str
    bundle: str
    model_path: str = ""  # the tinker:// path of its checkpoint; empty for a base model or an unnamed snapshot
    kind: str = "snapshot"
    run: str = ""  # of an unnamed snapshot: the run and the operation that saved it
    seq: int = 0


@dataclass(frozen=True)
class Sessions:
    store: Store

    async def create(self, session: Session) -> None:
        await marks.put(self.store, SessionId(session.session), "created")
        if not await self.store.put_if_absent(ObjectKind.SESSION.key(session.session), encode(session)):
            raise UserError(f"session {session.session} exists already")

    async def find_or_create(self, session: Session) -> Session:
        """The session, created if it does not exist. Only for ids that no other client can have."""
        await marks.put(self.store, SessionId(session.session), "created")
        if await self.store.put_if_absent(ObjectKind.SESSION.key(session.session), encode(session)):
            return session
        return await self.get(SessionId(session.session), session.tenant)

    async def find(self, session: SessionId) -> Session | None:
        """The session, of any tenant."""
        name = ObjectKind.SESSION.key(session)
        data = await self.store.get(name)
        return None if data is None else decode(data, Session, name)

    async def get(self, session: SessionId, tenant: str) -> Session:
        """The session. Raises NotFound, also for another tenant's."""
        if (record := await self.find(session)) is not None and record.tenant == tenant:
            return record
        raise NotFound(
            f"session {session!r} does not exist; create one with create_session (the SDK does so by itself)"
        )

    async def finish(self, session: SessionId, finish: Finish) -> None:
        """End the session; the first reason stays."""
        await marks.put(self.store, session, "finished")
        await self.store.put_if_absent(ObjectKind.FINISH.key(session), encode(finish))

    async def finished(self, session: SessionId) -> Finish | None:
        name = ObjectKind.FINISH.key(session)
        data = await self.store.get(name)
        return None if data is None else decode(data, Finish, name)

    async def assign(self, session: SessionId, project_id: str) -> None:
        """Move the session into the project."""
        prefix = ObjectKind.ASSIGNMENT.under(session)
        data = encode(Assignment(project_id=project_id))
        while True:
            n, _ = await newest_of_few(self.store, prefix)
            if await self.store.put_if_absent(f"{prefix}{number(n + 1)}", data):
                return

    async def project(self, session: Session) -> str:
        """The session's project, or empty."""
        prefix = ObjectKind.ASSIGNMENT.under(session.session)
        n, data = await newest_of_few(self.store, prefix)
        return session.project_id if data is None else decode(data, Assignment, f"{prefix}{number(n)}").project_id

    async def record_heartbeat(self, session: SessionId, day: int) -> None:
        """Note a sign of life on this day (counted from the epoch); it keeps the session's samplers alive too."""
        await self.store.put_if_absent(ObjectKind.HEARTBEAT.key(session, day), b"")

    async def over_since(self, session: SessionId, now: float) -> float | None:
        """When the session ended, by finishing or by a week without a heartbeat; None while it lives."""
        if (finish := await self.finished(session)) is not None:
            return finish.finished_at
        heartbeat = await newest_name(self.store, ObjectKind.HEARTBEAT.under(session))
        if heartbeat:
            silent_at = (layout.last_number(heartbeat) + 1) * DAY_S + limits.session_expiry_s
        else:
            record = await self.find(session)
            if record is None:  # unknown, so nothing of it may be deleted
                return None
            silent_at = record.created_at + limits.session_expiry_s
        return silent_at if now > silent_at else None

    async def delete(self, session: SessionId) -> int:
        """Delete all records of the session, its creation last. Return how many objects."""
        created = ObjectKind.SESSION.key(session)
        others = [name for name in await self.store.list(layout.session(session)) if name != created]
        return len(await many.each([*others, created], self.store.delete))


@dataclass(frozen=True)
class Samplers:
    store: Store

    async def create(self, sampler: Sampler) -> Sampler:
        """Create the sampler, or return the existing one for a repetition of the same request.

        Raises UserError if the id was used for other weights.
        """
        name = ObjectKind.SAMPLER.key(sampler.sampler)
        created = await self.store.put_if_absent(name, encode(sampler))
        if sampler.kind == "inflight":
            await self.store.put_if_absent(ObjectKind.INFLIGHT.key(sampler.run, sampler.seq), encode(sampler))
        if created:
            return sampler
        data = await self.store.get(name)
        if data is None:  # collected just now
            return await self.create(sampler)
        stored = decode(data, Sampler, name)
        if _identity(stored) != _identity(sampler):
            raise UserError(
                f"sampling_session_seq_id of {sampler.sampler} was used before, for "
                f"{stored.model_path or stored.base_model}; each sampling client needs a number of its own"
            )
        return stored

    async def get(self, sampler: SamplerId, tenant: str) -> Sampler:
        """The sampler. Raises NotFound, also for another tenant's."""
        name = ObjectKind.SAMPLER.key(sampler)
        data = await self.store.get(name)
        if data is not None and (record := decode(data, Sampler, name)).tenant == tenant:
            return record
        raise await self._missing(sampler, tenant)

    async def _missing(self, sampler: SamplerId, tenant: str) -> NotFound:
        """Why it is missing: a later sampler of the session shows that it existed."""
        session, n = session_of(sampler), int(sampler.rpartition(":")[2])
        sessions = Sessions(self.store)
        try:
            await sessions.get(session, tenant)
        except NotFound:
            return _no_sampler(sampler)
        if await sessions.finished(session) is not None:
            return NotFound(
                f"sampler {sampler} is gone: its session has finished; create another sampling client. Weights that "
                "are saved under a name (save_weights_for_sampler) stay"
            )
        numbers = [int(existing.rpartition(":")[2]) for existing in await self.of_session(session)]
        if not numbers:
            return NotFound(
                f"sampler {sampler} does not exist, or is gone: its session sent no heartbeat for a week; "
                "create another sampling client"
            )
        if n < max(numbers):
            return NotFound(
                f"sampler {sampler} is gone: newer weights of its run took its place, and nobody asked for it for a "
                "while (KNAPPER_KEEP_SAMPLERS_S says how long it is kept); sample from a newer one "
                "(save_weights_and_get_sampling_client), or keep weights under a name (save_weights_for_sampler)"
            )
        return _no_sampler(sampler)

    async def delete(self, sampler: Sampler) -> int:
        """Delete the record and its clones, but not its weights. Return how many objects."""
        clones = await self.store.list(ObjectKind.CLONE.under(sampler.sampler))
        doomed = [ObjectKind.SAMPLER.key(sampler.sampler), *clones]
        if sampler.kind == "inflight":
            doomed.append(ObjectKind.INFLIGHT.key(sampler.run, sampler.seq))
        return len(await many.each(doomed, self.store.delete))

    async def inflight_after(self, run: str, seq: int) -> Sampler | None:
        """The newest inflight sampler of the run that was saved after operation `seq`, or None."""
        name = await newest_name(self.store, ObjectKind.INFLIGHT.under(run), after=seq)
        data = await self.store.get(name) if name else None
        return None if data is None else decode(data, Sampler, name)

    async def join(self, sampler: SamplerId) -> int:
        """A unique number for another client of the sampler: 1, 2, 3, ... The client that created it has 0."""
        prefix = ObjectKind.CLONE.under(sampler)
        while True:
            name = await newest_name(self.store, prefix)
            n = layout.last_number(name) + 1 if name else 1
            if n > limits.clones_max:
                raise UserError(
                    f"{sampler} has {limits.clones_max} clones; allowed: no more; create another sampling client"
                )
            if await self.store.put_if_absent(f"{prefix}{number(n)}", b""):
                return n

    async def of_session(self, session: SessionId) -> list[SamplerId]:
        samplers = map(layout.sampler_of, await self.store.list(layout.samplers_of(session)))
        return sorted(samplers, key=lambda sampler: int(sampler.rpartition(":")[2]))


def _no_sampler(sampler: str) -> NotFound:
    return NotFound(f"sampler {sampler!r} does not exist; create one with create_sampling_client")


def _identity(sampler: Sampler) -> tuple[str, str, str, str, int]:
    return sampler.tenant, sampler.base_model, sampler.model_path, sampler.run, sampler.seq
