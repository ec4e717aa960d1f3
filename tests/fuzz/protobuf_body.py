"""Protobuf that is wrong: fields set to what they can hold and should not, and bytes that are no fields."""

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

from google.protobuf.message import Message

from tests.fuzz.bodies import Ask, World
from tests.fuzz.json_body import cut, named
from tests.fuzz.values import TEXTS


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _messages(message: Message) -> Iterator[Message]:
    """The message and those inside it."""
    yield message
    for spec, value in message.ListFields():
        if spec.message_type is None:
            continue
        if spec.message_type.GetOptions().map_entry:
            if spec.message_type.fields_by_name["value"].message_type is not None:
                for key in value:
                    yield from _messages(value[key])
        else:
            for inner in value if spec.is_repeated else [value]:
                yield from _messages(inner)


def field(ask: Ask, world: World, rng: Random) -> None:
    """A field of the message, or of one inside, set to what it can hold and should not."""
    message = rng.choice(list(_messages(ask.body)))
    spec: Any = rng.choice(list(message.DESCRIPTOR.fields))
    value = getattr(message, spec.name)
    if rng.random() < 0.2:
        message.ClearField(spec.name)
    elif spec.message_type is not None and spec.message_type.GetOptions().map_entry:
        _map(value, spec.message_type.fields_by_name["value"], rng)
    elif spec.message_type is not None and spec.is_repeated:
        value.extend([copy.deepcopy(each) for each in value] * rng.choice([1, 5000]))
    elif spec.message_type is not None:
        value.SetInParent()
    elif spec.is_repeated:
        value.extend([_held(spec, world, rng) for _ in range(rng.choice([1, 2, 100]))])
    else:
        setattr(message, spec.name, _held(spec, world, rng, value))


def _map(value: Any, spec: Any, rng: Random) -> None:
    if value and rng.random() < 0.5:
        del value[rng.choice(list(value))]
        return
    for n in range(rng.choice([1, 40, 70])):
        name = rng.choice(["weights", "logprobs", "colour", "", "x\x00", f"k{n}"])
        if spec.message_type is not None:
            value[name].SetInParent()
        else:
            value[name] = rng.choice([0.0, -1.0, 1e308])


def _held(spec: Any, world: World, rng: Random, old: Any = None) -> Any:
    """What a field of this type can hold."""
    if spec.type == spec.TYPE_STRING:
        return rng.choice([named(str(old or ""), world, rng), *(each for each in TEXTS if isinstance(each, str))])
    if spec.type == spec.TYPE_BYTES:
        data = bytes(old or b"")
        return rng.choice(
            [data[:-1], data + data, b"", data + b"\xff", b"\xff" * len(data), b"\x00\x00\xc0\x7f" * (len(data) // 4)]
        )
    if spec.cpp_type in (spec.CPPTYPE_DOUBLE, spec.CPPTYPE_FLOAT):
        return rng.choice([float("nan"), float("inf"), -1.0, -0.0, 0.0, 1e-45, 3e38])
    if spec.cpp_type == spec.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if spec.cpp_type == spec.CPPTYPE_ENUM:
        return rng.choice([0, 1, 2, 3, 4, 5, 99, -1])
    unsigned = spec.cpp_type in (spec.CPPTYPE_UINT32, spec.CPPTYPE_UINT64)
    small = spec.cpp_type in (spec.CPPTYPE_UINT32, spec.CPPTYPE_INT32)
    return rng.choice([0, 1, 2, 65, 10**6, 2**31 - 1, 2**31 - 1 if small else 2**63 - 1, 0 if unsigned else -1])


def wire(ask: Ask, world: World, rng: Random) -> None:
    """The fields on the wire: cut, doubled, of a wrong type, unknown, or with a length that is not theirs."""
    data = ask.body.SerializeToString()
    added = [
        _varint(rng.randrange(1, 40) << 3 | rng.randrange(8)) + rng.randbytes(rng.randrange(12)),
        _varint(3 << 3 | 2) + _varint(rng.choice([2**31, 2**62, 2**64 - 1, 10])),
        b"\xff" * rng.randrange(1, 12), _varint(1 << 3 | 2) + b"\x02\xff\xfe", b"\x0b" * rng.choice([1, 90, 200]),
        b"\x1a\x02\x0a\x00" * rng.choice([1, 5000]), _varint(999 << 3) + b"\x01",
    ]  # fmt: skip
    ask.body = cut(rng.choice([data + rng.choice(added), rng.choice(added) + data, data, data + data]), rng)
