"""Sessions and samplers: small create-only records that say who asked, and which weights a sampler holds for ever."""

from dataclasses import dataclass

from knapper import ids, limits
from knapper.errors import NotFound, UserError
from knapper.ids import SamplerId, SessionId
from knapper.journal import names
from knapper.journal.newest import newest_name, newest_of_few
from knapper.journal.records import Record, decode, encode
from knapper.store import Store

DAY_S = 24 * 3600.0


class Session(Record, frozen=True):
    """sessions/<id>/created"""

    session: str
    tenant: str
    created_at: float
    sdk_version: str = ""
    project_id: str = ""
    display_name: str = ""
    tags: list[str] = []
    user_metadata_json: str = "{}"


class Finish(Record, frozen=True):
    """sessions/<id>/finished: the first reason stays."""

    reason: str
    detail: str
    finished_at: float


class Assignment(Record, frozen=True):
    """sessions/<id>/project/<n>: the project that the session was moved to; the highest n wins."""

    project_id: str


class Sampler(Record, frozen=True):
    """samplers/<id>: one sampling session. `bundle` is the store prefix of its adapter, empty for the base model."""

    sampler: str
    tenant: str
    base_model: str
    bundle: str
    model_path: str = ""  # the tinker:// path it was made from; empty for a base model or an unnamed snapshot
    kind: str = "snapshot"
    run: str = ""  # of an unnamed snapshot: the run and the operation that saved it
    seq: int = 0


@dataclass(frozen=True)
class Sessions:
    store: Store

    async def create(self, session: Session) -> None:
        if not await self.store.put_if_absent(f"sessions/{session.session}/created", encode(session)):
            raise UserError(f"session {session.session} exists already")

    async def find_or_create(self, session: Session) -> Session:
        """The session as it stands: the one who made it first stays. Only for ids that nobody else can have."""
        if await self.store.put_if_absent(f"sessions/{session.session}/created", encode(session)):
            return session
        return await self.get(SessionId(session.session), session.tenant)

    async def get(self, session: SessionId, tenant: str) -> Session:
        """Raises NotFound, also for another tenant's."""
        name = f"sessions/{session}/created"
        data = await self.store.get(name)
        if data is not None and (found := decode(data, Session, name)).tenant == tenant:
            return found
        raise NotFound(
            f"session {session!r} does not exist; create one with create_session (the SDK does so by itself)"
        )

    async def finish(self, session: SessionId, finish: Finish) -> None:
        """End the session; the first reason stays."""
        await self.store.put_if_absent(f"sessions/{session}/finished", encode(finish))

    async def finished(self, session: SessionId) -> Finish | None:
        name = f"sessions/{session}/finished"
        data = await self.store.get(name)
        return None if data is None else decode(data, Finish, name)

    async def assign(self, session: SessionId, project_id: str) -> None:
        """Move the session into the project."""
        prefix = f"sessions/{session}/project/"
        data = encode(Assignment(project_id=project_id))
        while True:
            n, _ = await newest_of_few(self.store, prefix)
            if await self.store.put_if_absent(f"{prefix}{ids.number(n + 1)}", data):
                return

    async def project(self, session: Session) -> str:
        """The project that it is in, empty for none."""
        prefix = f"sessions/{session.session}/project/"
        n, data = await newest_of_few(self.store, prefix)
        return session.project_id if data is None else decode(data, Assignment, f"{prefix}{ids.number(n)}").project_id

    async def hear(self, session: SessionId, day: int) -> None:
        """Its client lived on this day (counted from the epoch); what its samplers hold lives with it."""
        await self.store.put_if_absent(f"sessions/{session}/heard/{ids.number(day)}", b"")

    async def over(self, session: SessionId, now: float) -> bool:
        """Whether it has finished, or is silent, so that nothing needs to be kept for it."""
        return await self.finished(session) is not None or await self.silent(session, now)

    async def silent(self, session: SessionId, now: float) -> bool:
        """Whether nobody has heard of it for a week."""
        heard = await newest_name(self.store, f"sessions/{session}/heard/")
        if heard:
            return now - (names.last_number(heard) + 1) * DAY_S > limits.session_silent_s
        name = f"sessions/{session}/created"
        data = await self.store.get(name)
        return data is None or now - decode(data, Session, name).created_at > limits.session_silent_s


@dataclass(frozen=True)
class Samplers:
    store: Store

    async def create(self, sampler: Sampler) -> Sampler:
        """The sampler as it stands: a repetition of the same request answers the first one's.

        Raises UserError if the id was used for other weights.
        """
        name = f"samplers/{sampler.sampler}"
        created = await self.store.put_if_absent(name, encode(sampler))
        if sampler.kind == "inflight":
            await self.store.put_if_absent(f"{_inflight(sampler.run)}{ids.number(sampler.seq)}", encode(sampler))
        if created:
            return sampler
        data = await self.store.get(name)
        assert data is not None, "samplers are never deleted"
        stored = decode(data, Sampler, name)
        if _identity(stored) != _identity(sampler):
            raise UserError(
                f"sampling_session_seq_id of {sampler.sampler} was used before, for "
                f"{stored.model_path or stored.base_model}; each sampling client needs a number of its own"
            )
        return stored

    async def get(self, sampler: SamplerId, tenant: str) -> Sampler:
        """Raises NotFound, also for another tenant's."""
        name = f"samplers/{sampler}"
        data = await self.store.get(name)
        if data is not None and (found := decode(data, Sampler, name)).tenant == tenant:
            return found
        raise NotFound(f"sampler {sampler!r} does not exist; create one with create_sampling_client")

    async def inflight_after(self, run: str, seq: int) -> Sampler | None:
        """The newest inflight sampler of the run that was saved after operation `seq`, or None."""
        name = await newest_name(self.store, _inflight(run), after=seq)
        data = await self.store.get(name) if name else None
        return None if data is None else decode(data, Sampler, name)

    async def join(self, sampler: SamplerId) -> int:
        """A number of its own for one more client of the sampler: 1, 2, 3, ... The client that made it has 0."""
        prefix = f"clones/{sampler}/"
        while True:
            name = await newest_name(self.store, prefix)
            n = names.last_number(name) + 1 if name else 1
            if n > limits.clones_max:
                raise UserError(
                    f"{sampler} has {limits.clones_max} clones; allowed: no more; create another sampling client"
                )
            if await self.store.put_if_absent(f"{prefix}{ids.number(n)}", b""):
                return n

    async def of_session(self, session: SessionId) -> list[SamplerId]:
        prefix = f"samplers/{session}:sample:"
        listed = [SamplerId(name.removeprefix("samplers/")) for name in await self.store.list(prefix)]
        return sorted(listed, key=lambda sampler: int(sampler.rpartition(":")[2]))


def _inflight(run: str) -> str:
    return f"inflight/{run}/"


def _identity(sampler: Sampler) -> tuple[str, str, str, str, int]:
    return sampler.tenant, sampler.base_model, sampler.model_path, sampler.run, sampler.seq
