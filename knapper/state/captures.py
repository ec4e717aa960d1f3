"""Agents' sessions as they were sampled, token for token: the turns of an episode, its score, a tenant's episodes.

A turn is one object, and what limits need of it is in its name. The list of episodes is written before their first
turn, and deleted after their last one, so that a writer that dies leaves nothing that is not listed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import msgspec

from knapper import limits
from knapper.errors import InvalidField, NotFound
from knapper.ids import EpisodeName, Tenant
from knapper.state import damage, layout
from knapper.state.journal.records import Drawn, Record, decode, encode
from knapper.state.layout import ObjectKind, last_number
from knapper.store import Names, Store, many

_TODO = "`knapper capture delete EPISODE` makes room"


class CapturedSequence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer: `tokens` int32, `logprobs` float32, little-endian, with the token or text that ended it."""

    tokens: bytes
    logprobs: bytes  # under the distribution that was drawn from
    stopped: bool  # False: max_tokens or the end of the context


class CapturedTurn(Record, frozen=True, kw_only=True):
    """One request of an agent and all answers to it."""

    model: str  # a checkpoint's path, or the base model's name
    base_model: str
    prompt: bytes  # int32, little-endian
    sequences: list[CapturedSequence]
    drawn: Drawn  # by which weights; `datums`: the sequences
    retry: int = 0  # how often the client had sent it before
    at: float


class EpisodeScore(Record, frozen=True, kw_only=True):
    """What an episode was worth; the newest counts."""

    score: float
    at: float


@dataclass(frozen=True)
class KeptTurn:
    """One turn with the id by which a list goes on after it."""

    id: str
    turn: CapturedTurn


@dataclass(frozen=True)
class TurnsPage:
    """`next`: the id after which the next page begins; None after the last one."""

    turns: list[KeptTurn]
    next: str | None


@dataclass(frozen=True)
class Episode:
    """`began_at`: seconds since the epoch. `bytes`: as stored."""

    name: EpisodeName
    began_at: float
    turns: int
    bytes: int
    score: float | None


class Captures:
    """Writes and reads them. `clock`: seconds since the epoch. `new_id`: random hexadecimal digits."""

    def __init__(self, store: Store, clock: Callable[[], float], new_id: Callable[[], str]) -> None:
        self._store, self._clock, self._new_id = store, clock, new_id

    async def admit(self, tenant: Tenant, name: EpisodeName, field: str) -> None:
        """Raises InvalidField, for the client's `field`, if a limit leaves no room for another turn.

        Turns under way are not counted: so many clients at once may exceed a limit by as many turns.
        """
        turns = await self._turns(tenant, name)
        if len(turns) >= limits.episode_turns_max:
            allowed = f"an episode of fewer than {limits.episode_turns_max} turns"
            raise InvalidField(field, str(name), allowed, "Begin another episode")
        if (size := _bytes(turns)) >= limits.episode_bytes_max:
            allowed = f"an episode that has fewer than {limits.episode_bytes_max} bytes, and not {size}"
            raise InvalidField(field, str(name), allowed, "Begin another episode")
        if not turns and name not in (known := await self.begun(tenant)) and len(known) >= limits.episodes_max:
            allowed = f"one of the {limits.episodes_max} episodes that there are"
            raise InvalidField(field, str(name), allowed, _TODO)

    async def keep(self, tenant: Tenant, name: EpisodeName, turn: CapturedTurn) -> str:
        """Return its id once it is durable. Raises StoreError."""
        place, us = layout.episode(tenant, name), int(self._clock() * 1e6)
        if not await self._store.list(ObjectKind.CAPTURED_TURN.under(*place), limit=1):
            await self._store.put_if_absent(ObjectKind.EPISODE.key(tenant, us, *place[1:]), b"")
        data = encode(turn)
        key = ObjectKind.CAPTURED_TURN.key(*place, us, self._new_id(), len(data))
        await self._store.put_if_absent(key, data)
        return _id(key)

    async def begun(self, tenant: Tenant) -> dict[EpisodeName, float]:
        """When each of the tenant's episodes began, the newest last."""
        begun: dict[EpisodeName, float] = {}
        for key in await self._store.list(ObjectKind.EPISODE.under(tenant)):
            _, us, name = layout.parse_episode(key)
            begun.setdefault(name, us / 1e6)
        return begun

    async def described(self, tenant: Tenant, begun: dict[EpisodeName, float]) -> list[Episode]:
        """Turns, bytes and score of each."""

        async def describe(each: tuple[EpisodeName, float]) -> Episode:
            name, began_at = each
            turns = await self._turns(tenant, name)
            return Episode(name, began_at, len(turns), _bytes(turns), await self.score(tenant, name))

        return await many.each(begun.items(), describe)

    async def turns(self, tenant: Tenant, name: EpisodeName, after: str, count: int) -> TurnsPage:
        """At most `count` turns after the one with the id `after`, in the order in which they were kept.

        Damaged ones are left out. Raises NotFound for an episode that has no turns.
        """
        await self.expect(tenant, name)
        later = [key for key in await self._turns(tenant, name) if _id(key) > after]
        sizes = accumulate(_bytes([key]) for key in later)
        fitting = sum(size <= limits.turns_listed_bytes_max for size in sizes)
        page = later[: min(count, max(fitting, 1))]

        async def read(key: str) -> KeptTurn | None:
            data = await self._store.get(key)
            return None if data is None else KeptTurn(_id(key), decode(data, CapturedTurn, key))

        turns = [turn for turn in await damage.readable(page, read) if turn is not None]
        return TurnsPage(turns, _id(page[-1]) if len(page) < len(later) else None)

    async def expect(self, tenant: Tenant, name: EpisodeName) -> None:
        """Raises NotFound for an episode that has no turns."""
        if not await self._store.list(ObjectKind.CAPTURED_TURN.under(*layout.episode(tenant, name)), limit=1):
            raise NotFound(f"episode {str(name)!r} does not exist; `knapper capture list` shows those that do")

    async def score(self, tenant: Tenant, name: EpisodeName) -> float | None:
        """The newest, or None."""
        keys = await self._store.list(ObjectKind.EPISODE_SCORE.under(*layout.episode(tenant, name)))
        for key in reversed(keys):
            data = await self._store.get(key)
            if data is not None:
                return decode(data, EpisodeScore, key).score
        return None

    async def set_score(self, tenant: Tenant, name: EpisodeName, score: float) -> None:
        """Durable on return. Raises NotFound for an episode that has no turns."""
        await self.expect(tenant, name)
        place = layout.episode(tenant, name)
        record = encode(EpisodeScore(score=score, at=self._clock()))
        while True:
            keys = await self._store.list(ObjectKind.EPISODE_SCORE.under(*place))
            n = last_number(keys[-1]) + 1 if keys else 1
            if await self._store.put_if_absent(ObjectKind.EPISODE_SCORE.key(*place, n), record):
                break
        for old in keys:
            await self._store.delete(old)

    async def delete(self, tenant: Tenant, name: EpisodeName) -> int:
        """Delete the episode for good; return how many turns it had."""
        listed = await self._store.list(ObjectKind.EPISODE.under(tenant))
        turns = await self._turns(tenant, name)
        await self._delete(tenant, name, [key for key in listed if layout.parse_episode(key)[2] == name])
        return len(turns)

    async def expire(self) -> int:
        """Delete all tenants' episodes that are too old; return how many."""
        oldest_us, old = int((self._clock() - limits.episode_s) * 1e6), 0
        for key in await self._store.list(ObjectKind.EPISODE.under()):
            tenant, us, name = layout.parse_episode(key)
            if us < oldest_us:
                await self._delete(Tenant(tenant), name, [key])
                old += 1
        return old

    async def _delete(self, tenant: Tenant, name: EpisodeName, listed: Names) -> None:
        place = layout.episode(tenant, name)
        scores = await self._store.list(ObjectKind.EPISODE_SCORE.under(*place))
        await many.each([*await self._turns(tenant, name), *scores], self._store.delete)
        await many.each(listed, self._store.delete)

    async def _turns(self, tenant: Tenant, name: EpisodeName) -> Names:
        return await self._store.list(ObjectKind.CAPTURED_TURN.under(*layout.episode(tenant, name)))


def _id(key: str) -> str:
    """What tells a turn from the others of its episode; sorts as they were kept."""
    return key.rpartition("/")[2].rpartition("-")[0]


def _bytes(turns: Names) -> int:
    return sum(int(key.rpartition("-")[2]) for key in turns)
