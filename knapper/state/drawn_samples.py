"""Which weights drew recent completions, for a gateway that did not draw them: after a restart, or beside another.

A tenant has few objects, of which each has the samples of some seconds; the oldest are deleted as new ones come.
"""

from typing import Final

import msgspec

from knapper.ids import Tenant
from knapper.state import damage
from knapper.state.journal.records import Drawn, Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store

OBJECTS_MAX: Final = 32  # of a tenant
SAMPLES_MAX: Final = 8192  # of an object, the newest


class DrawnTogether(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Completions that the same weights drew in the same way. `fingerprints`: eight bytes of each."""

    drawn: Drawn
    fingerprints: list[bytes]


class DrawnSamples(Record, frozen=True, kw_only=True):
    """drawn/<tenant>/<us>-<id>: what one gateway drew for a tenant in some seconds."""

    groups: list[DrawnTogether]


class DrawnSamplesLog:
    """Writes and reads them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def append(self, tenant: Tenant, at: float, writer: str, groups: list[DrawnTogether]) -> None:
        """`at`: seconds since the epoch. `writer`: a random id. Raises StoreError."""
        names = await self._store.list(ObjectKind.DRAWN.under(tenant))
        name = ObjectKind.DRAWN.key(tenant, int(at * 1e6), writer)
        await self._store.put_if_absent(name, encode(DrawnSamples(groups=groups)))
        for old in names[: max(0, len(names) + 1 - OBJECTS_MAX)]:
            await self._store.delete(old)

    async def after(self, tenant: Tenant, name: str) -> tuple[list[DrawnTogether], str]:
        """(what was stored behind `name`, oldest first and without damaged objects; the newest name)"""
        names = await self._store.list(ObjectKind.DRAWN.under(tenant), start_after=name)

        async def read(each: str) -> DrawnSamples | None:
            data = await self._store.get(each)
            return None if data is None else decode(data, DrawnSamples, each)

        found = await damage.readable(names, read)
        groups = [group for samples in found if samples is not None for group in samples.groups]
        return groups, names[-1] if names else name
