"""Every kind of object that lies in the store, and how damage to it is found out. `knapper verify` reads all by it.

A record has a checksum in its envelope, a part of a bundle one in its index, a file of a job one in its name; and what
has no content says all in its name.
"""

import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from knapper.catalogue.served_models import ModelRecord
from knapper.errors import KnapperError, damaged
from knapper.jobs.records import Control, Evaluated, Refusal, Rollouts, Scores, Started, Trained, Waiting
from knapper.state.api_keys import Key
from knapper.state.audit import Entry
from knapper.state.checkpoints import Checkpoint
from knapper.state.damage import ERRORS
from knapper.state.dead_letters import DeadLetter
from knapper.state.journal import bundles
from knapper.state.journal.accept import decode_creation
from knapper.state.journal.records import Commit, End, Index, Manifest, Operation, Record, decode
from knapper.state.secrets import opened_bytes
from knapper.state.sessions import Assignment, Finish, Sampler, Session
from knapper.state.usage import Samplings
from knapper.store import Store, many

_AT_ONCE = 256  # objects whose reading is under way


@dataclass(frozen=True)
class Empty:
    """Its name says all."""


@dataclass(frozen=True)
class Part:
    """Of a bundle, whose index has its size and hash."""


@dataclass(frozen=True)
class NamedByHash:
    """The last segment of its name is the SHA-256 of its bytes."""


@dataclass(frozen=True)
class SecretOrBare:
    """A record; one from before there were envelopes is bare text."""


Holds = type[Record] | Empty | Part | NamedByHash | SecretOrBare

_N, _ANY = r"\d{20}", r"[^/]+"
_STEP = rf"jobs/{_ANY}/{_ANY}/{_ANY}/(?:steps|evaluations)/{_N}"
_BUNDLE = rf"(?:runs/{_ANY}/snap|adapters/{_ANY})/{_N}-{_N}"
TABLE: Final[tuple[tuple[str, Holds], ...]] = (
    (rf"runs/{_ANY}/in/{_N}", Operation),
    (rf"runs/{_ANY}/out/{_N}", Commit),
    (rf"runs/{_ANY}/manifest/{_N}", Manifest),
    (rf"runs/{_ANY}/end/{_N}", End),
    (rf"runs/{_ANY}/used/{_ANY}", Empty()),
    (rf"{_BUNDLE}/index", Index),
    (rf"{_BUNDLE}/(?!index$){_ANY}", Part()),
    (rf"checkpoints/{_ANY}/{_ANY}/{_ANY}/{_ANY}/{_N}", Checkpoint),
    (rf"labels/{_ANY}/{_ANY}/{_ANY}/{_ANY}/{_N}/{_ANY}", Empty()),
    (rf"sessions/{_ANY}/created", Session),
    (rf"sessions/{_ANY}/finished", Finish),
    (rf"sessions/{_ANY}/project/{_N}", Assignment),
    (rf"sessions/{_ANY}/heard/{_N}", Empty()),
    (rf"samplers/{_ANY}", Sampler),
    (rf"inflight/{_ANY}/{_N}", Sampler),
    (rf"clones/{_ANY}/{_N}", Empty()),
    (rf"tenants/{_ANY}/sessions/{_ANY}", Empty()),
    (rf"tenants/{_ANY}/runs/{_ANY}/{_N}", Empty()),
    (rf"tenants/{_ANY}/(?:jobs|starts)/{_ANY}/{_ANY}(?:/{_ANY})?", Empty()),
    (rf"keys/{_ANY}/{_N}", Key),
    (rf"models/{_ANY}/{_N}", ModelRecord),
    (rf"audit/{_ANY}/{_ANY}/{_ANY}", Entry),
    (rf"dead/{_ANY}", DeadLetter),
    (rf"usage/{_ANY}/{_N}/{_ANY}", Samplings),
    (rf"used/{_ANY}/{_N}/{_ANY}/{_ANY}", Empty()),
    (rf"using/{_ANY}/{_ANY}/{_ANY}", Empty()),
    (r"accounts/began", Empty()),
    (rf"collect/(?:begun|now/{_ANY}/{_ANY}|later/{_N}/{_ANY})", Empty()),
    (rf"uploads/{_ANY}", Empty()),  # of before a job's start said what it was made from
    (r"secrets/(?:functions|links|tokens)", SecretOrBare()),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/started", Started),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/waiting", Waiting),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/listed", Empty()),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/again/{_N}", Empty()),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/control/{_N}", Control),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/refused/{_N}", Refusal),
    (rf"jobs/{_ANY}/{_ANY}/{_ANY}/files/[0-9a-f]{{64}}", NamedByHash()),
    (rf"{_STEP}/rollouts/{_N}", Rollouts),
    (rf"{_STEP}/scores/{_N}", Scores),
    (rf"{_STEP}/trained", Trained),
    (rf"{_STEP}/evaluated", Evaluated),
    (rf"(?:working|expected)/{_ANY}/{_ANY}/{_ANY}", Empty()),
)
_COMPILED = tuple((re.compile(pattern), holds) for pattern, holds in TABLE)


def holds(name: str) -> Holds | None:
    """What lies under the name, or None for a name that is none of ours."""
    return next((what for pattern, what in _COMPILED if pattern.fullmatch(name)), None)


async def check(store: Store, name: str) -> None:
    """Read the object as the product does. Raises Corrupt or NewerFormat; of one that is gone, nothing."""
    data = await store.get(name)
    if data is None:
        return
    match holds(name):
        case None:
            raise damaged(name, "its name is none that is given here, and nothing reads it")
        case Empty():
            if data:
                raise damaged(name, f"it has {len(data)} bytes, and says all in its name")
        case Part():
            await _check_part(store, name)
        case NamedByHash():
            if hashlib.sha256(data).hexdigest() != name.rpartition("/")[2]:
                raise damaged(name, f"its {len(data)} bytes are not those that its name is the SHA-256 of")
        case SecretOrBare():
            opened_bytes(data, name)
        case kind:
            record = decode(data, kind, name)
            if isinstance(record, Operation):
                await many.off_loop(lambda each: each.body(), record)
                if record.kind == "create":
                    decode_creation(record)


async def _check_part(store: Store, name: str) -> None:
    prefix, _, part = name.rpartition("/")
    index = await bundles.read_index(store, f"{prefix}/")
    if index is not None:  # else it is being written, or its writer died: the collector's
        await bundles.read_part(store, f"{prefix}/", index, part)


async def unreadable(store: Store) -> AsyncIterator[tuple[int, list[KnapperError]]]:
    """Check all objects, some at a time: (how many so far, what is wrong with the newest of them)."""

    async def one(name: str) -> KnapperError | None:
        try:
            await check(store, name)
        except ERRORS as error:
            return error
        return None

    listed = await store.list("")
    for at in range(0, len(listed), _AT_ONCE):
        some = listed[at : at + _AT_ONCE]
        yield at + len(some), [error for error in await many.each(some, one) if error is not None]
