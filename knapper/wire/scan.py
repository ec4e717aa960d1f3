"""Protobuf read field by field, without building objects: for untrusted requests, and for counting tokens."""

import struct
from collections.abc import Iterator
from typing import TypeVar

from knapper import limits
from knapper.errors import TooLarge, UserError

_DATUM = 3  # the number of ForwardBackwardRequest.data
_SEQUENCES, _TOKENS, _LOGPROBS = 1, 2, 3  # of SampleResponse, and of its sequences; a token has four bytes
_METRICS = 3  # of ForwardBackwardOutput: a map, whose entries have a name and a double
_PEEKED_BYTES = 4096  # what stands first may be a field without end, or a million empty ones
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type

B = TypeVar("B", bytes, memoryview)


def peek(prefix: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id) from the first bytes of a request, or None if they are not there.

    Protobuf writers put fields 1 and 2 first.
    """
    model_id, seq_id = "", 0
    try:
        for number, value in _fields(prefix[:_PEEKED_BYTES]):
            if number == 1 and isinstance(value, bytes):
                model_id = value.decode()
            elif number == 2 and isinstance(value, int):
                seq_id = value
            if model_id and 0 < seq_id < 2**31:
                return model_id, seq_id
    except (UserError, UnicodeDecodeError):
        pass
    return None


def bound(body: bytes) -> None:
    """Raises TooLarge for too many objects, UserError for bytes that are no protobuf.

    Parsing makes an object of some forty bytes of two on the wire, so a limit on bytes alone does not bound memory.
    """
    parts = 0
    for count, (number, value) in enumerate(_fields(memoryview(body))):
        if count >= limits.datums_per_request_max + limits.unknown_fields_max:
            raise TooLarge(f"data has too many datums; allowed: {limits.datums_per_request_max}; send fewer a call")
        if number == _DATUM and not isinstance(value, int):
            for _ in _fields(value):
                parts += 1
                if parts > limits.datum_parts_max:
                    raise TooLarge(
                        f"data has more than {limits.datum_parts_max} chunks, arrays and spans; allowed: that many; "
                        "merge consecutive text chunks, or send fewer datums a call"
                    )


def count_sampled(response: bytes) -> int:
    """The number of tokens in a SampleResponse, without unpacking or copying them. Raises UserError."""
    sequences = (value for number, value in _fields(memoryview(response)) if number == _SEQUENCES)
    fields = (field for sequence in sequences if not isinstance(sequence, int) for field in _fields(sequence))
    return sum(len(value) // 4 for number, value in fields if number == _TOKENS and not isinstance(value, int))


def sampled(response: bytes) -> Iterator[tuple[memoryview, memoryview]]:
    """(tokens, log-probabilities) of each completion in a SampleResponse that has both. Raises UserError."""
    for number, sequence in _fields(memoryview(response)):
        if number == _SEQUENCES and not isinstance(sequence, int):
            parts = {key: value for key, value in _fields(sequence) if not isinstance(value, int)}
            tokens, logprobs = parts.get(_TOKENS), parts.get(_LOGPROBS)
            if tokens is not None and logprobs is not None and len(tokens) == len(logprobs):
                yield tokens, logprobs


def metrics(output: bytes) -> dict[str, float]:
    """The metrics of a ForwardBackwardOutput, whose arrays are not copied. Raises UserError."""
    found = {}
    for number, entry in _fields(memoryview(output)):
        if number == _METRICS and not isinstance(entry, int):
            parts = {key: value for key, value in _fields(entry) if not isinstance(value, int)}
            found[bytes(parts.get(1, b"")).decode(errors="replace")] = struct.unpack("<d", parts.get(2, bytes(8)))[0]
    return found


def _fields(data: B) -> Iterator[tuple[int, int | B]]:
    """(number, value) of each field. Raises UserError for bytes that are malformed or end early."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire_type = tag & 7
        value: int | B
        if wire_type == 0:
            value, at = _varint(data, at)
        elif wire_type == 2 or wire_type in _FIXED_BYTES:  # groups, the other types, are not in this protocol
            size, at = _varint(data, at) if wire_type == 2 else (_FIXED_BYTES[wire_type], at)
            value, at = data[at : at + size], at + size
        else:
            raise _malformed(data, at)
        if at > len(data):
            raise _malformed(data, at)
        yield tag >> 3, value


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """(value, next offset)"""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10], strict=False):
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _malformed(data, at)


def _malformed(data: bytes | memoryview, at: int) -> UserError:
    return UserError(
        f"the forward_backward request is not protobuf: {len(data)} bytes make no sense at byte {min(at, len(data))}; "
        "allowed: what tinker 0.25 and newer send"
    )
