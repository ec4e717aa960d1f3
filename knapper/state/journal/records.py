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
    """Base of all records. `v` is the format: a type whose old records mean something else has a higher default.

    Old formats are read for ever, newer ones are refused; tests/golden has a file of every format.
    Formats 1 and 2 are also stored without an envelope, by early releases.
    """

    v: int = 1


class _Format(msgspec.Struct, frozen=True):
    """The field that records of any later format have too."""

    v: int


class Drawn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Datums of a pass whose completions one set of weights drew, as far as the gateway remembers its samples."""

    run: str  # the run that saved the weights; empty for the base model
    seq: int  # the operation that saved them; 0: as the run began
    step: int  # optimizer steps in them; -1: not known
    digest: str  # the beginning of the SHA-256 of their file, in hex; empty for the base model
    sampler: str = ""  # backend and dtype, as "engine float32"
    temperature: float = 1.0
    truncated: bool = False  # by top_k or top_p
    datums: int
    overdue: int = 0  # of these: begun and ended while the run stood still on newer weights


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a forward_backward trains on. `digest`: of its data and loss. `sampled`: datums with log-probabilities."""

    loss: str
    digest: bytes
    sampled: int = 0
    drawn: list[Drawn] = []


class Operation(Record, frozen=True, kw_only=True):
    """in/<seq>: one accepted operation. `sha256` is of its decompressed body, which is stored as zstd."""

    v: int = 3  # 1 had no asked_sha256: its sha256 was of the request, also of a pass sent as JSON; 2 no provenance
    run: str
    seq: int
    kind: Kind
    sha256: bytes
    body_zstd: bytes
    accepted_at: float  # seconds since the epoch, for people and the collector, never for order
    error: str = ""  # of a tombstone: its result
    asked_sha256: bytes = b""  # of the client's request, if that is not the body: JSON, stored as protobuf
    provenance: Provenance | None = None  # of a forward_backward that came through a gateway

    @property
    def request_sha256(self) -> bytes:
        """The hash of the client's request, by which a repetition is recognised."""
        return self.asked_sha256 or self.sha256

    def body(self) -> bytes:
        """The request's body, verified; of a creation the encoded `Creation`, of a pass always protobuf.

        Slow for large bodies. Raises Corrupt.
        """
        name = layout.operation(RunId(self.run), self.seq)
        try:
            body = zstd.decompress(self.body_zstd, limits.body_bytes_max)
        except UserError as error:
            raise damaged(name, f"field body_zstd cannot be decompressed: {error}") from error
        # A creation has the hash of the client's request, a tombstone of a gap has none.
        if self.kind == "create" or not self.sha256 or hashlib.sha256(body).digest() == self.sha256:
            return body
        if self.v == 1 and self.kind == "forward_backward" and _is_our_protobuf(body):
            return body
        raise damaged(name, "field sha256 is not that of its body")


def _is_our_protobuf(body: bytes) -> bool:
    """Whether this may be a pass that was sent as JSON: it is then protobuf exactly as this server encodes it."""
    try:
        return proto.encode_forward_backward(proto.decode_forward_backward(body)) == body
    except UserError:
        return False


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The published result of one operation. `failed`: a user's error; the state did not change."""

    seq: int
    sha256: bytes
    content_type: Literal["application/json", "application/x-protobuf"]
    body: bytes
    failed: bool = False
    source: str = ""  # of a load: the bundle, so that a replay loads the same files


class Commit(Record, frozen=True, kw_only=True):
    """out/<n>: results in order of seq, dense after those of out/<n-1>. A commit without results is a fence."""

    v: int = 2  # 1 had no device_s
    epoch: int
    results: list[Result]
    committed_at: float = 0.0  # seconds since the epoch, for people; 0 for a fence
    device_s: float = 0.0  # device seconds for the results; a replay adds none


class Spec(Record, frozen=True):
    """The configuration of a run; never changes after creation."""

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
    copied_from: str = ""  # the tinker:// path, if the run only holds a copied checkpoint and cannot be trained


class Creation(Record, frozen=True):
    """The body of in/0: a new run, from its seed or from the bundle `source`."""

    spec: Spec
    source: str = ""
    with_optimizer: bool = False


class Terms(Record, frozen=True):
    """The environment that the bits of a run depend on besides its operations. The dtype of a run never changes."""

    device: str  # e.g. "cpu x86_64 AVX512"
    dtype: str  # e.g. "float32"
    threads: int
    versions: str  # e.g. "torch 2.13.0+cpu"


class Manifest(Record, frozen=True):
    """manifest/<n>: the highest n wins. `snapshot`: a snap/ prefix; if empty, replay starts at the first operation."""

    epoch: int
    holder: str  # the name of the claim's holder, e.g. "host:pid:start"
    address: str  # where the holder listens: a hint, for routing only
    claimed_at: float
    terms: Terms
    snapshot: str = ""
    snapshot_seq: int = -1  # the newest operation in the snapshot
    snapshot_out: int = 0  # the newest out record in it
    snapshot_before: str = ""  # the second newest snapshot, which the collector keeps too
    snapshot_before_seq: int = -1
    snapshot_before_out: int = 0

    def claimed(self, holder: str, address: str, terms: Terms, now: float) -> "Manifest":
        """The manifest of the next epoch, with the same snapshots."""
        return msgspec.structs.replace(
            self, epoch=self.epoch + 1, holder=holder, address=address, terms=terms, claimed_at=now
        )

    def with_snapshot(self, prefix: str, seq: int, out: int) -> "Manifest":
        """The manifest with this as its newest snapshot."""
        return msgspec.structs.replace(
            self, snapshot=prefix, snapshot_seq=seq, snapshot_out=out, snapshot_before=self.snapshot,
            snapshot_before_seq=self.snapshot_seq, snapshot_before_out=self.snapshot_out,
        )  # fmt: skip

    def without_newest_snapshot(self) -> "Manifest":
        """The manifest whose newest snapshot is the one before."""
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


class Index(Record, frozen=True, kw_only=True):
    """Written last: a bundle (snapshot or adapter) exists once its index does. `spec` and `seq` name its origin."""

    v: int = 2  # 1 had no step
    spec: Spec
    seq: int
    epoch: int
    parts: list[Part]
    step: int = -1  # optimizer steps in the weights of an export; -1: not known


class Alarm(Record, frozen=True, kw_only=True):
    """alarm/<seq>/<name>: sampler and trainer part, or a run goes on otherwise than it seems meant to."""

    name: str
    seq: int  # the optimizer step at which it was seen
    step: int
    message: str  # what it is and what to do, for the run's user
    at: float  # seconds since the epoch


R = TypeVar("R", bound=Record)
_encoder = msgspec.msgpack.Encoder()


def encode(record: Record) -> bytes:
    """The record in its envelope, as it is stored. Equal records give equal bytes."""
    return envelope.seal(type(record).__name__, _encoder.encode(record))


def decode(data: bytes, kind: type[R], name: str) -> R:
    """The record. Raises Corrupt or NewerFormat, which name the object."""
    sealed = envelope.unseal(data, kind.__name__, name)
    content = data if sealed is None else sealed
    try:
        record = msgspec.msgpack.decode(content, type=kind)
    except envelope.UNREADABLE as error:
        v = _format(content)
        if v > (format_of(kind) if sealed is not None else envelope.FORMAT):
            raise envelope.newer(name, kind.__name__, v, format_of(kind)) from error
        reason = "its envelope is broken" if sealed is None and v == envelope.FORMAT else str(error)
        raise damaged(name, f"it is no {kind.__name__} record: {reason}") from error
    if sealed is None and (record.v < 1 or envelope.BARE_MAX < record.v <= envelope.FORMAT):
        raise damaged(name, f"field v is {record.v}, and a {kind.__name__} record of that format has an envelope")
    if record.v > format_of(kind):
        raise envelope.newer(name, kind.__name__, record.v, format_of(kind))
    return record


@cache
def format_of(kind: type[Record]) -> int:
    """The format in which this release writes the record."""
    return next(int(field.default) for field in msgspec.structs.fields(kind) if field.name == "v")


def _format(content: bytes | msgspec.Raw) -> int:
    try:
        return msgspec.msgpack.decode(content, type=_Format).v
    except envelope.UNREADABLE:
        return 0  # no record at all
