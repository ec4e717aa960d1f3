"""Checkpoints: names that users gave -> immutable bundles.

A name has versions; the highest wins, and a deletion is a version too.
"""

from dataclasses import dataclass

from knapper import ids
from knapper.errors import NotFound, UserError
from knapper.ids import TinkerPath
from knapper.journal.records import Record, decode, encode
from knapper.store import Store


class Checkpoint(Record, frozen=True):
    """checkpoints/<run>/<kind>/<name>/<n>.

    `bundle` is the store prefix of its files, empty if this version deletes the name.
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


@dataclass(frozen=True)
class Checkpoints:
    store: Store

    async def publish(self, checkpoint: Checkpoint, *, overwrite: bool) -> None:
        """Give the name to the bundle. Doing it again for the same operation of the run changes nothing.

        Raises UserError if another operation's checkpoint has the name and `overwrite` is false.
        """
        path = TinkerPath.parse(checkpoint.path)
        while True:
            versions = await self._versions(path)
            if any(version.seq == checkpoint.seq for _, version in versions):
                return
            n, newest = versions[-1] if versions else (0, None)
            if newest is not None and newest.bundle and not overwrite:
                raise UserError(
                    f"path is {path.name!r}, and {path} exists already (saved by operation {newest.seq}); "
                    "allowed: a new name, or overwrite=True where the method has it"
                )
            if await self.store.put_if_absent(f"{_prefix(path)}{ids.number(n + 1)}", encode(checkpoint)):
                return

    async def resolve(self, path: TinkerPath, tenant: str) -> Checkpoint:
        """The newest version. Raises NotFound, also for what belongs to another tenant and is not public."""
        listed = await self.store.list(_prefix(path))
        data = await self.store.get(listed[-1]) if listed else None
        if data is not None:
            checkpoint = decode(data, Checkpoint, listed[-1])
            if checkpoint.bundle and (checkpoint.tenant == tenant or checkpoint.public):
                return checkpoint
        raise NotFound(
            f"checkpoint {path} does not exist; save_state and save_weights_for_sampler answer the paths that do"
        )

    async def _versions(self, path: TinkerPath) -> list[tuple[int, Checkpoint]]:
        found = []
        for name in await self.store.list(_prefix(path)):
            data = await self.store.get(name)
            if data is not None:
                found.append((int(name.rpartition("/")[2]), decode(data, Checkpoint, name)))
        return found


def _prefix(path: TinkerPath) -> str:
    return f"checkpoints/{path.run}/{path.kind}/{path.name}/"
