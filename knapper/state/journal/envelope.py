"""The envelope that every record lies in: its format, its kind, and a checksum, so that damage never reads as content.

    {"v": 3, "kind": "Commit", "sha256": <32 bytes>, "record": {...}}    in msgpack

`v` is the envelope's format; the record within has its own. A knapper from before there were envelopes finds a higher
`v` than it knows, and says in words that a newer one wrote it.
"""

import hashlib
from typing import Final

import msgspec

from knapper.errors import NewerFormat, damaged

FORMAT: Final = 3
# What msgspec raises for bytes that are not what they should be: text that is no UTF-8, or lies too deep, has errors of
# Python's own.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
BARE_MAX: Final = 2  # the highest format of a record that was ever written without an envelope


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sha256`: over all the others."""

    v: int
    kind: str
    sha256: bytes
    record: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Envelope)


def seal(kind: str, record: bytes) -> bytes:
    """The record, which is msgpack, in an envelope. The same bytes for the same record, always."""
    envelope = _Envelope(v=FORMAT, kind=kind, sha256=_digest(FORMAT, kind, record), record=msgspec.Raw(record))
    return _encoder.encode(envelope)


def opened(data: bytes, kind: str, name: str) -> msgspec.Raw | None:
    """The record in the envelope, exactly as it was sealed; None if `data` is no envelope.

    Raises Corrupt for other bytes than were sealed, or another kind of record, NewerFormat for an envelope of later.
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


def newer(name: str, kind: str, found: int, known: int) -> NewerFormat:
    """The error for a format that is not known yet."""
    return NewerFormat(
        f"object {name} has format {found} of {kind}; this knapper reads up to format {known}: run the newer one",
        retry_after_s=30.0,
    )


def _digest(v: int, kind: str, record: bytes | msgspec.Raw) -> bytes:
    whole = hashlib.sha256(f"{v} {kind} ".encode())
    whole.update(memoryview(record))
    return whole.digest()
