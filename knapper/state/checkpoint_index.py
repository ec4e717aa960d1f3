"""Labels: the listed fields of checkpoints as object names without content, so that two listings return them all.

A label, <saved>-<expires>-<size>-<model>-<bundle> with times in microseconds, is written after its version and repeats
its fields. If one is missing (its writer died in between, or was an older release), the version is read and labelled.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote, unquote

from knapper.ids import CheckpointKind, RunId, TinkerPath
from knapper.state import damage
from knapper.state.layout import ObjectKind, label_of
from knapper.state.model_record import slug
from knapper.store import Names, Store, many

_ROOT, _LABELS = ObjectKind.CHECKPOINT.under(), ObjectKind.LABEL.under()


@dataclass(frozen=True)
class CheckpointEntry:
    """`version`: the object that it describes. `bundle`: empty if that deletes the name. Times as in `Checkpoint`."""

    version: str
    saved_at: float
    expires_at: float
    size_bytes: int
    model: str  # the slug of the base model
    bundle: str

    @staticmethod
    def of(
        version: str, saved_at: float, expires_at: float, size_bytes: int, base_model: str, bundle: str
    ) -> "CheckpointEntry":
        return CheckpointEntry(version, saved_at, expires_at, size_bytes, slug(base_model), bundle)

    @property
    def path(self) -> TinkerPath:
        _, run, kind, name, _ = ObjectKind.CHECKPOINT.parse(self.version)
        return TinkerPath(RunId(run), cast(CheckpointKind, kind), name)

    @property
    def key(self) -> str:
        """The name of the label in the store."""
        fields = (int(self.saved_at * 1e6), int(self.expires_at * 1e6), self.size_bytes, self.model)
        return label_of(self.version, f"{'-'.join(map(str, fields))}-{quote(self.bundle, safe='')}")

    def lives(self, now: float) -> bool:
        """Whether the name leads to files at this time."""
        return bool(self.bundle) and not 0.0 < self.expires_at <= now


def _parse(key: str) -> CheckpointEntry:
    *version, label = ObjectKind.LABEL.parse(key)
    saved, expires, size, model, bundle = label.split("-", 4)
    return CheckpointEntry(
        ObjectKind.CHECKPOINT.key(*version), int(saved) / 1e6, int(expires) / 1e6, int(size), model, unquote(bundle)
    )


Read = Callable[[str], Awaitable[CheckpointEntry | None]]


async def newest(store: Store, below: str, read: Read, *, all_of_them: bool) -> list[CheckpointEntry]:
    """The entry of the newest version of each name below `checkpoints/<below>`. `read` makes a missing label.

    A damaged version without a label is left out, or raises with `all_of_them`.
    """
    versions = {name.rpartition("/")[0]: name for name in await store.list(_ROOT + below)}  # sorted: the last one stays
    return await _labels(store, below, list(versions.values()), read, all_of_them)


async def every(store: Store, below: str, read: Read) -> list[CheckpointEntry]:
    """The entry of every version, in order. Raises for a damaged version without a label."""
    return await _labels(store, below, await store.list(_ROOT + below), read, True)


async def remove(store: Store, entries: Iterable[CheckpointEntry]) -> int:
    """Delete the versions and their labels; return how many objects."""
    doomed = list(entries)
    await many.each([entry.key for entry in doomed], store.delete)
    await many.each([entry.version for entry in doomed], store.delete)
    return 2 * len(doomed)


async def _labels(store: Store, below: str, versions: Names, read: Read, all_of_them: bool) -> list[CheckpointEntry]:
    labels = {label.version: label for label in damage.parsed(await store.list(_LABELS + below), _parse)}

    async def make(version: str) -> CheckpointEntry | None:
        label = await read(version)
        if label is not None:
            await store.put_if_absent(label.key, b"")
        return label

    unlabelled = [version for version in versions if version not in labels]
    read_each = many.each if all_of_them else damage.readable
    labels |= {label.version: label for label in await read_each(unlabelled, make) if label is not None}
    return [labels[version] for version in versions if version in labels]
