"""Sessions and samplers: small create-only records that say who asked, and which weights a sampler holds for ever."""

from dataclasses import dataclass

from knapper.errors import NotFound, UserError
from knapper.ids import SamplerId, SessionId
from knapper.journal.records import Record, decode, encode
from knapper.store import Store


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


@dataclass(frozen=True)
class Samplers:
    store: Store

    async def create(self, sampler: Sampler) -> Sampler:
        """The sampler as it stands: a repetition of the same request answers the first one's.

        Raises UserError if the id was used for other weights.
        """
        name = f"samplers/{sampler.sampler}"
        if await self.store.put_if_absent(name, encode(sampler)):
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


def _identity(sampler: Sampler) -> tuple[str, str, str, str, int]:
    return sampler.tenant, sampler.base_model, sampler.model_path, sampler.run, sampler.seq
