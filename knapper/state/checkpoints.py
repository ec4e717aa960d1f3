"""Checkpoints: names that users gave -> immutable bundles.

A name has versions; the highest wins. Publishing, a new time to live and a deletion are versions too. The files of a
bundle may outlast the names that led to it: `knapper.state.gc` says for how long.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from knapper.errors import NotFound, UserError
from knapper.ids import RunId, TinkerPath, number, session_of
from knapper.state import checkpoint_index, damage, layout
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.gc import marks
from knapper.state.journal.accept import decode_creation
from knapper.state.journal.records import Operation, Record, decode, encode
from knapper.store import Store
from knapper.store.cache import LruCache

EVERYONE = ""


class Checkpoint(Record, frozen=True):
    """A version of a name.

    `bundle` is the store prefix of its files, empty if this version deletes the name. Times in seconds since the epoch.
    """

    path: str
    tenant: str
    base_model: str
    rank: int
    bundle: str
    seq: int  # the operation that saved it: a replay finds its own work by this
    size_bytes: int
    saved_at: float
    expires_at: float = 0.0  # 0: never
    public: bool = False
    user_metadata: dict[str, str] = {}
    recipients: list[str] = []  # of age, for whom its files are encrypted when they are downloaded; none: nobody does

    def expect_plain(self) -> None:
        """Raises UserError for an encrypted one, which is for downloads alone: no other way leads around the key."""
        if self.recipients:
            raise UserError(
                f"checkpoint {self.path} is encrypted for its recipients (age_encryption_recipients) and can only be "
                "downloaded; load or sample from one that save_state or save_weights_for_sampler made"
            )

    def lives(self, now: float) -> bool:
        """Whether the name leads to its files at this time."""
        return bool(self.bundle) and not 0.0 < self.expires_at <= now


@dataclass(frozen=True)
class Checkpoints:
    """`clock`: seconds since the epoch; what has expired by it answers as what is missing."""

    store: Store
    clock: Callable[[], float]
    _read: LruCache[str, Checkpoint | None] = field(default_factory=LruCache, repr=False, compare=False)

    async def save(self, checkpoint: Checkpoint, *, overwrite: bool) -> None:
        """Give the name to the bundle. Doing it again for the same operation of the run changes nothing.

        Raises UserError if another operation's checkpoint has the name and `overwrite` is false.
        """
        path = TinkerPath.parse(checkpoint.path)
        prefix = layout.checkpoint(path, checkpoint.tenant)
        if await self._put(f"{prefix}{number(1)}", checkpoint):
            return
        while True:
            listed = await self.store.list(prefix)
            versions = [version for name in listed if (version := await self._version(name)) is not None]
            if versions and versions[-1].seq >= checkpoint.seq > 0:  # of a later one: ours was overwritten long ago
                return
            if any(version.seq == checkpoint.seq for version in versions):
                return
            if versions and versions[-1].lives(self.clock()) and not overwrite:
                raise UserError(
                    f"path is {path.name!r}, and {path} exists already (saved by operation {versions[-1].seq}); "
                    "allowed: a new name, or overwrite=True where the method has it"
                )
            n = layout.last_number(listed[-1]) if listed else 0
            if await self._put(f"{prefix}{number(n + 1)}", checkpoint):
                return

    async def resolve(self, path: TinkerPath, tenant: str) -> Checkpoint:
        """The newest version. Raises NotFound, also for what belongs to another tenant and is not public."""
        if (own := await self._living(path, tenant)) is not None:
            return own
        owner = await self._owner(path.run)
        if owner is not None and owner != tenant:
            other = await self._living(path, owner)
            if other is not None and other.public:
                return other
        raise _missing(path)

    async def publish(self, path: TinkerPath, tenant: str, public: bool) -> None:
        """Let every tenant read it, or only its owner. Raises NotFound, also for another tenant's."""
        await self._change(path, tenant, public=public)

    async def set_ttl(self, path: TinkerPath, tenant: str, ttl_s: int | None) -> None:
        """Let it expire so many seconds from now, or never. Raises NotFound, also for another tenant's."""
        await self._change(path, tenant, expires_at=0.0 if ttl_s is None else self.clock() + ttl_s)

    async def deleted(self, path: TinkerPath, tenant: str) -> bool:
        """Whether the tenant has deleted it, and not made it anew."""
        _, newest = await self._newest(path, tenant)
        return newest is not None and not newest.bundle

    async def delete(self, path: TinkerPath, tenant: str) -> None:
        """Take the name away; a repetition changes nothing. Raises NotFound, also for another tenant's."""
        if not await self.deleted(path, tenant):
            await self._change(path, tenant, bundle="", public=False)

    async def own(self, path: TinkerPath, tenant: str) -> Checkpoint:
        """The newest version of the tenant's own. Raises NotFound, also for what another tenant made public."""
        if (found := await self._living(path, tenant)) is None:
            raise _missing(path)
        return found

    async def labels(self, tenant: str, within: str = "") -> list[CheckpointEntry]:
        """The tenant's, newest first: all, or those of the runs whose ids begin with `within`. EVERYONE: all there are.

        Two listings, however many there are; nothing is read.
        """
        below = "" if tenant == EVERYONE else f"{tenant}/{within}"
        now = self.clock()
        found = [
            label
            for label in await checkpoint_index.newest(self.store, below, self._label, all_of_them=not tenant)
            if label.lives(now)
        ]
        return sorted(found, key=lambda label: (label.saved_at, str(label.path)), reverse=True)

    async def read(self, chosen: Iterable[CheckpointEntry]) -> list[Checkpoint]:
        """What they are about, in their order; damaged ones are left out."""
        found = await damage.readable(chosen, lambda label: self._version(label.version))
        return [checkpoint for checkpoint in found if checkpoint is not None]

    async def listed(self, tenant: str, within: str = "") -> list[Checkpoint]:
        """As `labels`, and all of it read."""
        return await self.read(await self.labels(tenant, within))

    async def versions(self, tenant: str, within: str) -> list[list[CheckpointEntry]]:
        """Of each name below all versions that there are, the newest last, whether it lives or not."""
        found: dict[str, list[CheckpointEntry]] = {}
        for label in await checkpoint_index.every(self.store, f"{tenant}/{within}", self._label):
            found.setdefault(str(label.path), []).append(label)
        return list(found.values())

    async def _change(self, path: TinkerPath, tenant: str, **changes: object) -> None:
        while True:
            n, newest = await self._newest(path, tenant)
            if newest is None or not newest.lives(self.clock()):
                raise _missing(path)
            changed = msgspec.structs.replace(newest, **changes)
            if changed == newest:
                return
            for run in {path.run, layout.run_of_export(newest.bundle)}:  # a copy's files lie where its source's do
                await marks.put(self.store, session_of(run), f"{path.run}-{path.kind}-{path.name}-{n + 1}")
            if await self._put(f"{layout.checkpoint(path, tenant)}{number(n + 1)}", changed):
                return

    async def _living(self, path: TinkerPath, tenant: str) -> Checkpoint | None:
        _, newest = await self._newest(path, tenant)
        return newest if newest is not None and newest.lives(self.clock()) else None

    async def _newest(self, path: TinkerPath, tenant: str) -> tuple[int, Checkpoint | None]:
        prefix = layout.checkpoint(path, tenant)
        listed = await self.store.list(prefix)
        n, newest = (layout.last_number(listed[-1]), await self._version(listed[-1])) if listed else (0, None)
        # A load must not take an old version because a listing lags: what no listing shows yet is found by its name.
        while (data := await self.store.get(name := f"{prefix}{number(n + 1)}")) is not None:
            n, newest = n + 1, decode(data, Checkpoint, name)
        return n, newest

    async def _put(self, version: str, checkpoint: Checkpoint) -> bool:
        """True if it is stored; then it is labelled too."""
        if not await self.store.put_if_absent(version, encode(checkpoint)):
            return False
        await self.store.put_if_absent(_label_of(version, checkpoint).place, b"")
        return True

    async def _label(self, version: str) -> CheckpointEntry | None:
        checkpoint = await self._version(version)
        return None if checkpoint is None else _label_of(version, checkpoint)

    async def _version(self, name: str) -> Checkpoint | None:
        async def load() -> Checkpoint | None:
            data = await self.store.get(name)
            return None if data is None else decode(data, Checkpoint, name)

        return await self._read.get(name, load)

    async def _owner(self, run: RunId) -> str | None:
        name = layout.operation(run, 0)
        data = await self.store.get(name)
        return None if data is None else decode_creation(decode(data, Operation, name)).spec.tenant


def _label_of(version: str, checkpoint: Checkpoint) -> CheckpointEntry:
    return CheckpointEntry.of(
        version, checkpoint.saved_at, checkpoint.expires_at, checkpoint.size_bytes, checkpoint.base_model,
        checkpoint.bundle,
    )  # fmt: skip


def _missing(path: TinkerPath) -> NotFound:
    return NotFound(
        f"checkpoint {path} does not exist; save_state and save_weights_for_sampler answer the paths that do"
    )
