"""What processes found out about the products of their CPU: one small object each, for all later processes.

The search takes seconds of a cold start, and a pod has no disk of its own. A result never changes, so it is created
once; any may be deleted, and is then found out again.
"""

import hashlib

from knapper.errors import Corrupt, NewerFormat
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store, many


class ProbeResult(Record, frozen=True, kw_only=True):
    """The row layout of one product (its fields: `RowLayout`), and whether it keeps the bits."""

    product: str
    least: int
    block: int
    larger: tuple[int, ...] = ()
    alone: bool = False
    invariant: bool


async def read(store: Store, fingerprint: str) -> dict[str, ProbeResult]:
    """All results of this fingerprint by product. A damaged one is left out: it is then searched for again."""
    names = await store.list(ObjectKind.PROBE_RESULT.under(fingerprint))

    async def one(name: str) -> ProbeResult | None:
        try:
            data = await store.get(name)
            return None if data is None else decode(data, ProbeResult, name)
        except (Corrupt, NewerFormat):
            return None

    return {result.product: result for result in await many.each(names, one) if result is not None}


async def keep(store: Store, fingerprint: str, result: ProbeResult) -> None:
    """Store the result, unless another process has."""
    name = hashlib.sha256(result.product.encode()).hexdigest()
    await store.put_if_absent(ObjectKind.PROBE_RESULT.key(fingerprint, name), encode(result))
