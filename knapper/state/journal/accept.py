"""The gateway's half of the journal: an operation is durable in `in/<seq>` before its client gets a response."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from knapper import limits
from knapper.errors import InvalidField, NotFound, UserError
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import ends
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import Creation, Kind, Manifest, Operation, Provenance, decode, encode
from knapper.store import Store, many
from knapper.wire import zstd

_ON_LOOP_BYTES_MAX = 256 * 1024  # larger records are encoded in a thread: all requests share the event loop
_MANIFEST_FRESH_S = 3600.0  # an operation that is sent again after that gets an error that says its record is gone


@dataclass(frozen=True)
class PackedBody:
    """A body as it will be stored. `pack` does the work; call it off the event loop."""

    sha256: bytes
    body_zstd: bytes
    asked_sha256: bytes = b""  # of the client's request, if the body is another encoding of it


def pack(body: bytes) -> PackedBody:
    return PackedBody(hashlib.sha256(body).digest(), zstd.compress(body))


class Acceptor:
    """Stores operations, in any order of arrival. Any number of acceptors may share a store: each has only a cache."""

    def __init__(self, store: Store, clock: Callable[[], float], manifests: Manifests | None = None) -> None:
        self._store = store
        self._clock = clock
        self._manifests = manifests or Manifests(store)
        self._consumed: dict[RunId, tuple[float, int]] = {}

    async def create(self, creation: Creation, request: bytes) -> None:
        """Create the run: store operation 0. `request` is the client's body, by whose hash a repetition is recognised.

        Raises UserError if another request created the run, NotFound if it has ended.
        """
        run = RunId(creation.spec.run)
        if (end := await ends.ended(self._store, run)) is not None:
            raise ends.refusal(run, end)
        packed = PackedBody(hashlib.sha256(request).digest(), zstd.compress(encode(creation)))
        await self._put(run, 0, "create", packed)

    async def creation(self, run: RunId) -> Creation | None:
        """The creation of the run, or None if there is no such run."""
        operation = await self._stored(run, 0)
        return None if operation is None else decode_creation(operation)

    async def missing(self, run: RunId, seq: int) -> bool:
        """Whether the store has no record of the operation: it never arrived, or was collected."""
        return await self._store.get(layout.operation(run, seq)) is None

    async def accept(
        self, run: RunId, seq: int, kind: Kind, packed: PackedBody, provenance: Provenance | None = None
    ) -> float | None:
        """Store the operation, durably; return the time of acceptance, or None for a repetition of the same body.

        Raises UserError if another body has `seq`, or if it is so old that its record is gone.
        """
        if not 1 <= seq < 10**18:
            raise InvalidField("seq_id", seq, "1, 2, 3, ... for each operation of the run")
        if seq <= await self._consumed_seq(run) and await self._stored(run, seq) is None:
            raise UserError(
                f"seq_id {seq} of {run} was applied long ago and its record is gone; "
                "continue with the next seq_id, or resume from a checkpoint"
            )
        return await self._put(run, seq, kind, packed, provenance=provenance)

    async def accepted_at(self, run: RunId, seq: int) -> float | None:
        """When the operation was first accepted, or None if the store has no record of it."""
        stored = await self._stored(run, seq)
        return None if stored is None else stored.accepted_at

    async def reject(self, run: RunId, seq: int, packed: PackedBody, error: str) -> None:
        """Store a tombstone in place of a request that cannot be served; its result will be `error`."""
        await self._put(run, seq, "tombstone", packed, error)

    async def fill_gaps(self, run: RunId, applied: int, finished: bool) -> list[int]:
        """Fill sequence numbers that never arrived with tombstones, so that later operations can run; return them.

        `applied`: the newest operation known to be applied. `finished`: the session has ended, so nothing more arrives.
        """
        waiting = await self._store.list(layout.operations(run), start_after=layout.operation(run, max(applied, 0)))
        filled: list[int] = []
        expected = max(applied, 0) + 1
        for name in waiting:
            seq = layout.last_number(name)
            if seq > expected:
                later = decode(await self._must_get(name), Operation, name)
                if finished or self._clock() - later.accepted_at >= limits.sequence_gap_s:
                    for gap in range(expected, seq):
                        await self._fill_with_tombstone(run, gap)
                        filled.append(gap)
            expected = seq + 1
        return filled

    async def _fill_with_tombstone(self, run: RunId, seq: int) -> None:
        error = (
            f"operation {seq} of {run} never arrived (its request was cancelled, or could not be read), "
            "while a later one did; it was skipped"
        )
        packed = PackedBody(b"", zstd.compress(b""))
        operation = self._operation(run, seq, "tombstone", packed, error)
        await self._store.put_if_absent(layout.operation(run, seq), encode(operation))

    async def _put(
        self,
        run: RunId,
        seq: int,
        kind: Kind,
        packed: PackedBody,
        error: str = "",
        provenance: Provenance | None = None,
    ) -> float | None:
        operation = self._operation(run, seq, kind, packed, error, provenance)
        large = len(packed.body_zstd) > _ON_LOOP_BYTES_MAX
        data = await many.off_loop(encode, operation) if large else encode(operation)
        if await self._store.put_if_absent(layout.operation(run, seq), data):
            return operation.accepted_at
        stored = await self._stored(run, seq)
        # A request that arrives after its tombstone gets that error from its future, like any error of an operation.
        if stored is None or stored.kind == "tombstone" or stored.request_sha256 == operation.request_sha256:
            return None
        if not _same_sampler_save(stored, operation):
            raise UserError(
                f"seq_id {seq} of {run} was used before, for another request ({stored.kind}); "
                "each operation needs a seq_id of its own, and a retry must repeat the same bytes"
            )
        return None

    def _operation(
        self, run: RunId, seq: int, kind: Kind, packed: PackedBody, error: str, provenance: Provenance | None = None
    ) -> Operation:
        return Operation(
            run=run, seq=seq, kind=kind, sha256=packed.sha256, body_zstd=packed.body_zstd,
            accepted_at=self._clock(), error=error, asked_sha256=packed.asked_sha256, provenance=provenance,
        )  # fmt: skip

    async def _stored(self, run: RunId, seq: int) -> Operation | None:
        name = layout.operation(run, seq)
        data = await self._store.get(name)
        return None if data is None else decode(data, Operation, name)

    async def _must_get(self, name: str) -> bytes:
        data = await self._store.get(name)
        if data is None:
            raise NotFound(f"{name} was collected while it was being read")
        return data

    async def _consumed_seq(self, run: RunId) -> int:
        """The newest operation in a snapshot: records up to it may have been collected."""
        cached = self._consumed.get(run)
        if cached is not None and self._clock() - cached[0] < _MANIFEST_FRESH_S:
            return cached[1]
        newest = await self._manifests.newest(run)
        seq = newest[1].snapshot_seq if newest else -1
        self._consumed[run] = (self._clock(), seq)
        return seq


def _same_sampler_save(stored: Operation, retry: Operation) -> bool:
    """Whether only the sampler's number differs: the SDK draws a new one for each retry, and the first one counts."""
    if not stored.kind == retry.kind == "save_weights_for_sampler":
        return False
    first, second = (msgspec.json.decode(operation.body()) for operation in (stored, retry))
    number = "sampling_session_seq_id"
    return bool(number in first and number in second and {**first, number: 0} == {**second, number: 0})


def decode_creation(operation: Operation) -> Creation:
    return decode(operation.body(), Creation, layout.operation(RunId(operation.run), 0))


async def newest_manifest(store: Store, run: RunId) -> tuple[int, Manifest] | None:
    """(n, manifest) of the highest n, or None if the run was never claimed. `Manifests` caches for repeated reads."""
    return await Manifests(store).newest(run)
