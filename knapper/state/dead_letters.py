"""Dead letters: undeliverable events, kept for the operator.

Named by the hash of the event and its destination, so that a repeated delivery adds nothing.
"""

import hashlib

from knapper import limits
from knapper.state import damage
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Names, Store


class DeadLetter(Record, frozen=True):
    """`attributes`: of the event, and Knative's reason: knativeerrordest, knativeerrorcode, knativeerrordata."""

    attributes: dict[str, str]
    body: bytes
    kept_at: float


async def keep(store: Store, letter: DeadLetter) -> str:
    """Store the letter; return its name in the store."""
    identity = "|".join(
        letter.attributes.get(name, "") for name in ("source", "id", "type", "subject", "knativeerrordest")
    )
    name = ObjectKind.DEAD_LETTER.key(hashlib.sha256(identity.encode() + b"|" + letter.body).hexdigest())
    await store.put_if_absent(name, encode(letter))
    return name


async def listed(store: Store) -> list[DeadLetter]:
    """The oldest first; at most `dead_letters_listed_max`, of any age."""
    names: Names = await store.list(ObjectKind.DEAD_LETTER.under(), limit=limits.dead_letters_listed_max)

    async def read(name: str) -> DeadLetter | None:
        data = await store.get(name)
        return None if data is None else decode(data, DeadLetter, name)

    letters = [letter for letter in await damage.readable(names, read) if letter is not None]
    return sorted(letters, key=lambda letter: letter.kept_at)
