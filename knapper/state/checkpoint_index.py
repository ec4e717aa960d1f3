"""Labels: what lists tell of checkpoints, in names without content, so that two listings tell it of all.

A label, <saved>-<expires>-<size>-<model>-<bundle> with times in microseconds, is stuck on after its version was made,
and says what the version says. Where one is missing (its maker died in between, or was an older one) the version is
read, and labelled: a label is never more than a copy.
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
    """`version`: the object that it is about. `bundle`: empty where that deletes the name. Times as in `Checkpoint`."""

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
    def place(self) -> str:
        """Where it lies."""
        told = (int(self.saved_at * 1e6), int(self.expires_at * 1e6), self.size_bytes, self.model)
        return label_of(self.version, f"{'-'.join(map(str, told))}-{quote(self.bundle, safe='')}")

    def lives(self, now: float) -> bool:
        """Whether the name leads to its files at this time."""
        return bool(self.bundle) and not 0.0 < self.expires_at <= now


def _parse(place: str) -> CheckpointEntry:
    *version, told = ObjectKind.LABEL.parse(place)
    saved, expires, size, model, bundle = told.split("-", 4)
    return CheckpointEntry(
        ObjectKind.CHECKPOINT.key(*version), int(saved) / 1e6, int(expires) / 1e6, int(size), model, unquote(bundle)
    )


Read = Callable[[str], Awaitable[CheckpointEntry | None]]


async def newest(store: Store, below: str, read: Read, *, all_of_them: bool) -> list[CheckpointEntry]:
    """Of the newest version of each name below `checkpoints/<below>`. `read` makes the label of one that has none.

    `all_of_them`: raises if one that has none is damaged; else that is left out.
    """
    versions = {name.rpartition("/")[0]: name for name in await store.list(_ROOT + below)}  # sorted: the last one stays
    return await _labels(store, below, list(versions.values()), read, all_of_them)


async def every(store: Store, below: str, read: Read) -> list[CheckpointEntry]:
    """Of every version, in order. Raises if one that has none is damaged."""
    return await _labels(store, below, await store.list(_ROOT + below), read, True)


async def remove(store: Store, chosen: Iterable[CheckpointEntry]) -> int:
    """Delete the versions, and what tells of them; return how many objects."""
    gone = list(chosen)
    await many.each([label.place for label in gone], store.delete)
    await many.each([label.version for label in gone], store.delete)
    return 2 * len(gone)


async def _labels(store: Store, below: str, versions: Names, read: Read, all_of_them: bool) -> list[CheckpointEntry]:
    labels = {label.version: label for label in damage.parsed(await store.list(_LABELS + below), _parse)}

    async def make(version: str) -> CheckpointEntry | None:
        label = await read(version)
        if label is not None:
            await store.put_if_absent(label.place, b"")
        return label

    unlabelled = [version for version in versions if version not in labels]
    each = many.each if all_of_them else damage.readable
    made = {label.version: label for label in await each(unlabelled, make) if label is not None}
    known = labels | made
    return [known[version] for version in versions if version in known]
