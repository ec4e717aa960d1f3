"""The envelope of every record: its format, its kind, and a checksum, so that damage is never read as content.

    {"v": 3, "kind": "Commit", "sha256": <32 bytes>, "record": {...}}    in msgpack

`v` is the envelope's format; the record inside has its own. Releases without envelopes find a higher `v` than they
know, and report that a newer one wrote it.
"""

import hashlib
from typing import Final

import msgspec

from knapper.errors import NewerFormat, damaged

FORMAT: Final = 3
# What msgspec raises for wrong bytes. Text that is not UTF-8, or nested too deeply, raises Python's own errors.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
BARE_MAX: Final = 2  # the highest format of records without an envelope


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sha256`: of all other fields."""

    v: int
    kind: str
    sha256: bytes
    record: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Envelope)


def seal(kind: str, record: bytes) -> bytes:
    """The record (msgpack) in an envelope. Equal records give equal bytes."""
    envelope = _Envelope(v=FORMAT, kind=kind, sha256=_digest(FORMAT, kind, record), record=msgspec.Raw(record))
    return _encoder.encode(envelope)


def unseal(data: bytes, kind: str, name: str) -> msgspec.Raw | None:
    """The record as it was sealed, or None if `data` is no envelope.

    Raises Corrupt if the checksum or the kind of record is wrong, NewerFormat for an envelope of a later release.
    """
    try:
        envelope = _decoder.decode(data)
    except UNREADABLE:
        return None
    if envelope.sha256 != _digest(envelope.v, envelope.kind, envelope.record):
        raise damaged(name, f"field sha256 is not that of its other bytes, so it is not the {kind} record that it was")
    if envelope.v > FORMAT:
        raise newer(name, kind, envelope.v, FORMAT)
    if envelope.kind != kind:
        raise damaged(name, f"field kind is {envelope.kind!r}; allowed there: {kind!r}")
    return envelope.record


def newer(name: str, kind: str, stored: int, known: int) -> NewerFormat:
    """The error for a format that this release does not know."""
    return NewerFormat(
        f"object {name} has format {stored} of {kind}; this knapper reads up to format {known}: run the newer one",
        retry_after_s=30.0,
    )


def _digest(v: int, kind: str, record: bytes | msgspec.Raw) -> bytes:
    digest = hashlib.sha256(f"{v} {kind} ".encode())
    digest.update(memoryview(record))
    return digest.digest()
