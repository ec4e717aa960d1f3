"""The journal's records: one an object, each in an envelope with its checksum (`knapper.state.journal.envelope`)."""

import hashlib
from functools import cache
from typing import Literal, TypeVar

import msgspec

from knapper import limits
from knapper.errors import UserError, damaged
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import envelope
from knapper.wire import proto, zstd

Kind = Literal[
    "create", "forward_backward", "optim_step", "load_weights", "save_weights", "save_weights_for_sampler",
    "save_weights_external", "tombstone",
]  # fmt: skip
SAVES: frozenset[Kind] = frozenset({"save_weights", "save_weights_for_sampler", "save_weights_external"})


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all. `v` is the format: a type whose old records mean something else has a higher default.

    Old formats are read for ever, newer ones are refused; tests/golden has a file of each that there ever was.
    Formats 1 and 2 also lie bare in the store, from before there were envelopes.
    """

    v: int = 1


class _Format(msgspec.Struct):
    """What even a record of the future tells."""

    v: int


class Operation(Record, frozen=True, kw_only=True):
    """in/<seq>: one accepted operation, as it came.

    `sha256` is over the body (decompressed), which is kept as zstd.
    """

    v: int = 2  # 1 had no asked_sha256: its sha256 was that, also of a pass that came as JSON
    run: str
    seq: int
    kind: Kind
    sha256: bytes
    body_zstd: bytes
    accepted_at: float  # seconds since the epoch, for people and for the collector; never for order
    error: str = ""  # of a tombstone: what the client is told
    asked_sha256: bytes = b""  # over what the client sent, where that is not the body: JSON, stored as protobuf

    @property
    def asked(self) -> bytes:
        """The hash of what the client sent, by which a repetition is told."""
        return self.asked_sha256 or self.sha256

    def body(self) -> bytes:
        """As the client sent it, verified; of a creation the `Creation`, encoded, and of a pass always protobuf.

        Takes a while for a large one.

        Raises Corrupt.
        """
        where = layout.operation(RunId(self.run), self.seq)
        try:
            body = zstd.decompress(self.body_zstd, limits.body_bytes_max)
        except UserError as error:
            raise damaged(where, f"field body_zstd cannot be decompressed: {error}") from error
        # That of a creation is over the client's request, and what nobody sent has none.
        if self.kind == "create" or not self.sha256 or hashlib.sha256(body).digest() == self.sha256:
            return body
        if self.v == 1 and self.kind == "forward_backward" and _is_written_by_us(body):
            return body
        raise damaged(where, "field sha256 is not that of its body")


def _is_written_by_us(body: bytes) -> bool:
    """Whether it may be a pass that came as JSON: as protobuf it is then exactly as we write it."""
    try:
        return proto.encode_forward_backward(proto.decode_forward_backward(body)) == body
    except UserError:
        return False


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The published answer to one operation. `failed`: a user's error; the state did not change."""

    seq: int
    sha256: bytes
    content_type: Literal["application/json", "application/x-protobuf"]
    body: bytes
    failed: bool = False
    source: str = ""  # of a load: the bundle whose files were loaded, so that a replay loads the same


class Commit(Record, frozen=True, kw_only=True):
    """out/<n>: results in order of seq, dense after those of out/<n-1>.

    No results: a fence, which only says who holds the run.
    """

    v: int = 2  # 1 had no device_s
    epoch: int
    results: list[Result]
    committed_at: float = 0.0  # seconds since the epoch, for people; of a fence 0
    device_s: float = 0.0  # of the device, to compute the results; a replay of them adds nothing


class Spec(Record, frozen=True):
    """What a run is; never changes after creation."""

    run: str
    tenant: str
    base_model: str
    rank: int
    alpha: float
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    user_metadata_json: str = "{}"
    keep_tied: bool = False  # a head that is the embedding is not adapted, whatever train_unembed says
    copied_from: str = ""  # of a run that only holds a copied checkpoint, and cannot be trained: the tinker:// path


class Creation(Record, frozen=True):
    """The body of in/0: the new run, fresh from its seed or from the bundle `source`."""

    spec: Spec
    source: str = ""
    with_optimizer: bool = False


class Terms(Record, frozen=True):
    """What the bits of a run depend on besides its operations. Of these, the dtype of a run never changes."""

    device: str  # e.g. "cpu x86_64 AVX512"
    dtype: str  # e.g. "float32"
    threads: int
    versions: str  # e.g. "torch 2.13.0+cpu"


class Manifest(Record, frozen=True):
    """manifest/<n>: the highest n wins.

    `snapshot` names a snap/ prefix, or is empty: replay from the first operation.
    """

    epoch: int
    holder: str  # whose claim it is, e.g. "host:pid:start"
    address: str  # where the holder listens: a hint, for routing only
    claimed_at: float
    terms: Terms
    snapshot: str = ""
    snapshot_seq: int = -1  # the newest operation that the snapshot contains
    snapshot_out: int = 0  # the newest out record that it contains
    snapshot_before: str = ""  # the second newest, which the collector keeps too
    snapshot_before_seq: int = -1
    snapshot_before_out: int = 0

    def claimed(self, holder: str, address: str, terms: Terms, now: float) -> "Manifest":
        """The next epoch's, over the same snapshots."""
        return msgspec.structs.replace(
            self, epoch=self.epoch + 1, holder=holder, address=address, terms=terms, claimed_at=now
        )

    def with_snapshot(self, prefix: str, seq: int, out: int) -> "Manifest":
        """Recoveries start from it."""
        return msgspec.structs.replace(
            self, snapshot=prefix, snapshot_seq=seq, snapshot_out=out, snapshot_before=self.snapshot,
            snapshot_before_seq=self.snapshot_seq, snapshot_before_out=self.snapshot_out,
        )  # fmt: skip

    def without_newest_snapshot(self) -> "Manifest":
        """Recoveries start from the one before it."""
        return msgspec.structs.replace(
            self, snapshot=self.snapshot_before, snapshot_seq=self.snapshot_before_seq,
            snapshot_out=self.snapshot_before_out, snapshot_before="", snapshot_before_seq=-1, snapshot_before_out=0,
        )  # fmt: skip


class End(Record, frozen=True):
    """end/<n>: the run is over, and nothing of it may be written any more; the highest n wins.

    `finished`: its session ended long ago, and its state was deleted; `deleted`: its tenant, or the operator, said so.
    """

    reason: Literal["finished", "deleted"]
    tenant: str
    at: float  # seconds since the epoch
    asked_at: float = 0.0  # when the newest operation was accepted


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One object of a bundle."""

    name: str
    size: int
    sha256: bytes


class Index(Record, frozen=True):
    """Written last: a bundle (snapshot or adapter) exists once its index does.

    `spec` and `seq` say whose it is and when.
    """

    spec: Spec
    seq: int
    epoch: int
    parts: list[Part]


R = TypeVar("R", bound=Record)
_encoder = msgspec.msgpack.Encoder()


def encode(record: Record) -> bytes:
    """What is stored: the record in its envelope. The same bytes for equal records, always."""
    return envelope.seal(type(record).__name__, _encoder.encode(record))


def decode(data: bytes, kind: type[R], name: str) -> R:
    """The record. Raises Corrupt or NewerFormat, which name the object."""
    inside = envelope.opened(data, kind.__name__, name)
    content = data if inside is None else inside
    try:
        record = msgspec.msgpack.decode(content, type=kind)
    except envelope.UNREADABLE as error:
        found = _format(content)
        if found > (format_of(kind) if inside is not None else envelope.FORMAT):
            raise envelope.newer(name, kind.__name__, found, format_of(kind)) from error
        why = "its envelope is broken" if inside is None and found == envelope.FORMAT else str(error)
        raise damaged(name, f"it is no {kind.__name__} record: {why}") from error
    if inside is None and (record.v < 1 or envelope.BARE_MAX < record.v <= envelope.FORMAT):
        raise damaged(name, f"field v is {record.v}, and a {kind.__name__} record of that format lies in an envelope")
    if record.v > format_of(kind):
        raise envelope.newer(name, kind.__name__, record.v, format_of(kind))
    return record


@cache
def format_of(kind: type[Record]) -> int:
    """The format in which it is written today."""
    return next(int(field.default) for field in msgspec.structs.fields(kind) if field.name == "v")


def _format(content: bytes | msgspec.Raw) -> int:
    try:
        return msgspec.msgpack.decode(content, type=_Format).v
    except envelope.UNREADABLE:
        return 0  # it is no record at all
