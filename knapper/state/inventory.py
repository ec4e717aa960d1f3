"""The integrity check of each kind of object, as `knapper verify` runs it.

A record has a checksum in its envelope, a part of a bundle one in its index, a file of a job one in its name; markers
have no content at all.
"""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from knapper.errors import KnapperError, damaged
from knapper.state import layout
from knapper.state.api_keys import Key
from knapper.state.audit import Entry
from knapper.state.captures import CapturedTurn, EpisodeScore
from knapper.state.checkpoints import Checkpoint
from knapper.state.damage import ERRORS
from knapper.state.dead_letters import DeadLetter
from knapper.state.drawn_samples import DrawnSamples
from knapper.state.gc.uses import SamplersInUse
from knapper.state.job_records import (
    Control,
    EnvironmentAnswers,
    Evaluated,
    Refusal,
    Rollouts,
    SampledTurns,
    Scores,
    Started,
    Trained,
    Trial,
    TrialEnded,
    Waiting,
)
from knapper.state.journal import bundles
from knapper.state.journal.accept import decode_creation
from knapper.state.journal.records import Alarm, Commit, End, Index, Manifest, Operation, Record, decode
from knapper.state.layout import ObjectKind
from knapper.state.model_record import ModelRecord
from knapper.state.probe_results import ProbeResult
from knapper.state.quotas import Quotas
from knapper.state.secrets import Secret, decode_secret
from knapper.state.sessions import Assignment, Finish, Sampler, Session
from knapper.state.usage import Samplings
from knapper.store import Store, many

_AT_ONCE = 256  # objects that are read at the same time


@dataclass(frozen=True)
class Empty:
    """A marker: all of its information is in its name."""


@dataclass(frozen=True)
class BundlePart:
    """A file of a bundle; the index has its size and hash."""


@dataclass(frozen=True)
class NamedByHash:
    """The last segment of its name is the SHA-256 of its bytes."""


@dataclass(frozen=True)
class SecretOrBare:
    """A record, or bare text from releases without envelopes."""


Holds = type[Record] | Empty | BundlePart | NamedByHash | SecretOrBare

_RECORDS: Final[tuple[type[Record], ...]] = (
    Alarm, Assignment, CapturedTurn, Checkpoint, Commit, Control, DeadLetter, DrawnSamples, End, Entry,
    EnvironmentAnswers, EpisodeScore, Evaluated, Finish, Index, Key, Manifest, ModelRecord, Operation, ProbeResult,
    Quotas, Refusal, Rollouts, SampledTurns, Sampler, SamplersInUse, Samplings, Scores, Session, Started, Trained,
    Trial, TrialEnded, Waiting,
)  # fmt: skip
_HELD: Final[dict[str, Holds]] = {
    layout.EMPTY: Empty(), layout.PART: BundlePart(), layout.NAMED_BY_HASH: NamedByHash(),
    Secret.__name__: SecretOrBare(),
    **{record.__name__: record for record in _RECORDS},
}  # fmt: skip
TABLE: Final[dict[ObjectKind, Holds]] = {kind: _HELD[kind.holds] for kind in ObjectKind}


def holds(name: str) -> Holds | None:
    """The content of the object with this name, or None for a name that the layout does not have."""
    kind = layout.kind_of(name)
    return None if kind is None else TABLE[kind]


async def check(store: Store, name: str) -> None:
    """Read the object as the server does. Raises Corrupt or NewerFormat; a missing object is no error."""
    data = await store.get(name)
    if data is None:
        return
    match holds(name):
        case None:
            raise damaged(name, "no kind of object has such a name, and nothing reads it")
        case Empty():
            if data:
                raise damaged(name, f"it has {len(data)} bytes, and says all in its name")
        case BundlePart():
            await _check_part(store, name)
        case NamedByHash():
            if hashlib.sha256(data).hexdigest() != name.rpartition("/")[2]:
                raise damaged(name, f"its {len(data)} bytes are not those that its name is the SHA-256 of")
        case SecretOrBare():
            decode_secret(data, name)
        case kind:
            record = decode(data, kind, name)
            if isinstance(record, Operation):
                await many.off_loop(Operation.body, record)
                if record.kind == "create":
                    decode_creation(record)


async def _check_part(store: Store, name: str) -> None:
    prefix, _, part = name.rpartition("/")
    index = await bundles.read_index(store, f"{prefix}/")
    if index is not None:  # else it is unfinished, which is the collector's business
        await bundles.read_part(store, f"{prefix}/", index, part)


async def unreadable(store: Store) -> AsyncIterator[tuple[int, list[KnapperError]]]:
    """Check all objects in groups; yield (objects checked so far, errors of the newest group)."""

    async def error_of(name: str) -> KnapperError | None:
        try:
            await check(store, name)
        except ERRORS as error:
            return error
        return None

    names = await store.list("")
    for at in range(0, len(names), _AT_ONCE):
        group = names[at : at + _AT_ONCE]
        yield at + len(group), [error for error in await many.each(group, error_of) if error is not None]
