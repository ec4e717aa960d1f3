"""Checkpoints: users' names for immutable bundles.

A name has versions; the highest wins. Publishing, a new time to live and a deletion are versions too. A bundle may
outlive its names: `knapper.state.gc` says for how long.
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
    """A version of a name. `bundle`: the store prefix of its files, or empty if this version deletes the name.

    Times in seconds since the epoch.
    """

    path: str
    tenant: str
    base_model: str
    rank: int
    bundle: str
    seq: int  # the operation that saved it, by which a replay recognises its own save
    size_bytes: int
    saved_at: float
    expires_at: float = 0.0  # 0: never
    public: bool = False
    user_metadata: dict[str, str] = {}
    recipients: list[str] = []  # age recipients, for whom downloads are encrypted; empty: not encrypted

    def expect_plain(self) -> None:
        """Raises UserError for an encrypted checkpoint: only downloads encrypt it, so nothing else may read it."""
        if self.recipients:
            raise UserError(
                f"checkpoint {self.path} is encrypted for its recipients (age_encryption_recipients) and can only be "
                "downloaded; load or sample from one that save_state or save_weights_for_sampler made"
            )

    def lives(self, now: float) -> bool:
        """Whether the name leads to files at this time."""
        return bool(self.bundle) and not 0.0 < self.expires_at <= now


@dataclass(frozen=True)
class Checkpoints:
    """`clock`: seconds since the epoch. An expired checkpoint is treated like a missing one."""

    store: Store
    clock: Callable[[], float]
    _read: LruCache[str, Checkpoint | None] = field(default_factory=LruCache, repr=False, compare=False)

    async def save(self, checkpoint: Checkpoint, *, overwrite: bool) -> None:
        """Name the bundle. A repetition by the same operation changes nothing.

        Raises UserError if a checkpoint of another operation has the name and `overwrite` is false.
        """
        path = TinkerPath.parse(checkpoint.path)
        prefix = layout.checkpoint(path, checkpoint.tenant)
        if await self._put(f"{prefix}{number(1)}", checkpoint):
            return
        while True:
            names = await self.store.list(prefix)
            versions = [version for name in names if (version := await self._version(name)) is not None]
            if versions and versions[-1].seq >= checkpoint.seq > 0:  # a later save has overwritten this one
                return
            if any(version.seq == checkpoint.seq for version in versions):
                return
            if versions and versions[-1].lives(self.clock()) and not overwrite:
                raise UserError(
                    f"path is {path.name!r}, and {path} exists already (saved by operation {versions[-1].seq}); "
                    "allowed: a new name, or overwrite=True where the method has it"
                )
            n = layout.last_number(names[-1]) if names else 0
            if await self._put(f"{prefix}{number(n + 1)}", checkpoint):
                return

    async def resolve(self, path: TinkerPath, tenant: str) -> Checkpoint:
        """The newest version. Raises NotFound, also for another tenant's checkpoint that is not public."""
        if (own := await self._living(path, tenant)) is not None:
            return own
        owner = await self._owner(path.run)
        if owner is not None and owner != tenant:
            other = await self._living(path, owner)
            if other is not None and other.public:
                return other
        raise _missing(path)

    async def publish(self, path: TinkerPath, tenant: str, public: bool) -> None:
        """Let every tenant read it, or only its owner. Raises NotFound, also for another tenant's checkpoint."""
        await self._change(path, tenant, public=public)

    async def set_ttl(self, path: TinkerPath, tenant: str, ttl_s: int | None) -> None:
        """Let it expire `ttl_s` from now, or never. Raises NotFound, also for another tenant's checkpoint."""
        await self._change(path, tenant, expires_at=0.0 if ttl_s is None else self.clock() + ttl_s)

    async def deleted(self, path: TinkerPath, tenant: str) -> bool:
        """Whether the newest version deletes the name."""
        _, newest = await self._newest(path, tenant)
        return newest is not None and not newest.bundle

    async def delete(self, path: TinkerPath, tenant: str) -> None:
        """Delete the name; a repetition changes nothing. Raises NotFound, also for another tenant's checkpoint."""
        if not await self.deleted(path, tenant):
            await self._change(path, tenant, bundle="", public=False)

    async def own(self, path: TinkerPath, tenant: str) -> Checkpoint:
        """The newest version of the tenant's own. Raises NotFound, also for another tenant's public checkpoint."""
        if (checkpoint := await self._living(path, tenant)) is None:
            raise _missing(path)
        return checkpoint

    async def labels(self, tenant: str, within: str = "") -> list[CheckpointEntry]:
        """The tenant's entries, newest first: all, or of runs whose ids begin with `within`. EVERYONE: of all tenants.

        Costs two listings and no reads, however many there are.
        """
        below = "" if tenant == EVERYONE else f"{tenant}/{within}"
        now = self.clock()
        entries = await checkpoint_index.newest(self.store, below, self._label, all_of_them=not tenant)
        living = [entry for entry in entries if entry.lives(now)]
        return sorted(living, key=lambda entry: (entry.saved_at, str(entry.path)), reverse=True)

    async def read(self, entries: Iterable[CheckpointEntry]) -> list[Checkpoint]:
        """The checkpoints of the entries, in their order; damaged ones are left out."""
        versions = await damage.readable(entries, lambda entry: self._version(entry.version))
        return [checkpoint for checkpoint in versions if checkpoint is not None]

    async def listed(self, tenant: str, within: str = "") -> list[Checkpoint]:
        """As `labels`, with the checkpoints read."""
        return await self.read(await self.labels(tenant, within))

    async def versions(self, tenant: str, within: str) -> list[list[CheckpointEntry]]:
        """All versions of each name below `within`, the newest last, living or not."""
        by_path: dict[str, list[CheckpointEntry]] = {}
        for entry in await checkpoint_index.every(self.store, f"{tenant}/{within}", self._label):
            by_path.setdefault(str(entry.path), []).append(entry)
        return list(by_path.values())

    async def _change(self, path: TinkerPath, tenant: str, **changes: object) -> None:
        while True:
            n, newest = await self._newest(path, tenant)
            if newest is None or not newest.lives(self.clock()):
                raise _missing(path)
            changed = msgspec.structs.replace(newest, **changes)
            if changed == newest:
                return
            for run in {path.run, layout.run_of_export(newest.bundle)}:  # a copy shares its source's files
                await marks.put(self.store, session_of(run), f"{path.run}-{path.kind}-{path.name}-{n + 1}")
            if await self._put(f"{layout.checkpoint(path, tenant)}{number(n + 1)}", changed):
                return

    async def _living(self, path: TinkerPath, tenant: str) -> Checkpoint | None:
        _, newest = await self._newest(path, tenant)
        return newest if newest is not None and newest.lives(self.clock()) else None

    async def _newest(self, path: TinkerPath, tenant: str) -> tuple[int, Checkpoint | None]:
        prefix = layout.checkpoint(path, tenant)
        names = await self.store.list(prefix)
        n, newest = (layout.last_number(names[-1]), await self._version(names[-1])) if names else (0, None)
        # A listing may lag, and a load must not take an old version: later versions are read by name.
        while (data := await self.store.get(name := f"{prefix}{number(n + 1)}")) is not None:
            n, newest = n + 1, decode(data, Checkpoint, name)
        return n, newest

    async def _put(self, version: str, checkpoint: Checkpoint) -> bool:
        """Store and label the version; False if the name is taken."""
        if not await self.store.put_if_absent(version, encode(checkpoint)):
            return False
        await self.store.put_if_absent(_label_of(version, checkpoint).key, b"")
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
