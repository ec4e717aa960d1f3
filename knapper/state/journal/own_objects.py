"""Objects that a claim creates, told from those of a later claim and of a copy of this process."""

from knapper.errors import Fenced
from knapper.store import Store


class OwnObjects:
    """Creates objects of one claim, and knows them again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unsure = set[str]()  # names that this claim tried to create, with an outcome that it does not know

    async def create(self, name: str, data: bytes) -> bytes | None:
        """None once the object is this claim's, else what another wrote there. Raises Fenced if that was collected.

        Equal bytes are this claim's only if an attempt of it failed that may have stored them. Otherwise a copy of this
        very process wrote them: one image of its memory may go on twice, and both then write the same.
        """
        tried = name in self._unsure
        self._unsure.add(name)
        created = await self._store.put_if_absent(name, data)
        stored = None if created else await self._store.get(name)
        self._unsure.discard(name)
        if created or (tried and stored == data):
            return None
        if stored is None:
            raise Fenced(f"{name} was taken and collected: this claim has slept for long")
        return stored
