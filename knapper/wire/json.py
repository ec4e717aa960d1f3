"""Strict JSON: an unknown field, a wrong type or a value out of bounds becomes an error that says what is allowed."""

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, TypeVar, get_args

import msgspec

from knapper.errors import InvalidField, UserError
from knapper.text.suggestions import did_you_mean
from knapper.wire.untrusted import parsing

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")
_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")
_WHERE = re.compile(r" \(byte (\d+)\)$")
_SHOWN_BYTES_MAX = 64 * 1024  # of a body whose wrong value is looked for: it takes building all of it once more
_NAMED = re.compile(r"^Object (contains unknown|missing required) field `(.*)`$", re.DOTALL)


def decode(body: bytes, kind: type[S]) -> S:
    """The request, every field checked. Raises UserError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), _sent(body), kind) from error
    except Exception as error:  # whatever it raises: the same as in knapper.wire.untrusted
        with parsing(partial(_not_json, body)):
            for field, value in _not_finite(loads(body)) if len(body) <= _SHOWN_BYTES_MAX else _bare(body, str(error)):
                raise InvalidField(field, value, "a finite number") from error
            raise error


def _bare(body: bytes, error: str) -> Iterator[tuple[str, str]]:
    """What is no number at the place that the error names: (where, what)."""
    if (where := _WHERE.search(error)) and (found := _NOT_FINITE.match(body, int(where[1]))):
        yield f"the body at byte {where[1]}", found[0].decode()


_UNSEEN: Final = object()  # a body that is not looked through for the value that is wrong


def _sent(body: bytes) -> Any:
    return loads(body) if len(body) <= _SHOWN_BYTES_MAX else _UNSEEN


def convert(sent: dict[str, str], kind: type[S]) -> S:
    """The parameters of a query, every one checked as `decode` checks fields. Raises UserError."""
    try:
        return msgspec.convert(sent, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(str(error), sent, kind) from error


def shape(sent: object, kind: type[T], at: str) -> T:
    """A part of what was decoded, which stands at field `at`. Raises InvalidField."""
    try:
        return msgspec.convert(sent, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), sent, kind, at) from error


def loads(body: bytes) -> Any:
    """Whatever JSON this is, NaN and Infinity included, but no key twice in an object. Raises UserError."""
    with parsing(partial(_not_json, body)):
        return _DECODER.decode(body.decode())


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidField(name, "there a second time", "each field once")
            seen.add(name)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _not_json(body: bytes, error: Exception) -> UserError:
    return UserError(f"the body ({len(body)} bytes) is not JSON: {error}")


def _explain(message: str, sent: Any, kind: Any, at: str = "") -> InvalidField:
    """`at`: the field at which `sent` stands, where that is not the whole body."""
    found = _PLACE.match(message)
    assert found is not None, "every part of the pattern may be empty"
    what, steps = found["what"], _STEP.findall(found["path"] or "")
    path = [at] if at else []
    path += [name or f"[{index or '...'}]" for name, index, _ in steps]
    field = ".".join(path).replace(".[", "[") or "the body"
    value, known = sent, sent is not _UNSEEN
    for name, index, _ in steps:
        try:
            value = value[name or int(index)]
        except (ValueError, KeyError, IndexError, TypeError):  # below a dict, whose key msgspec does not tell
            known = False
            break
    if named := _NAMED.match(what):
        inside = "" if field == "the body" else f"{field}."
        if named[1] == "missing required":
            return InvalidField(f"{inside}{named[2]}", None, "a value: this field is required")
        given = value.get(named[2]) if known and isinstance(value, dict) else "(not shown)"
        fields = _fields_at(kind, [name for name, _, _ in steps if name])
        allowed = f"no field of this name, only {', '.join(fields) or 'the documented ones'}"
        return InvalidField(f"{inside}{named[2]}", given, allowed, did_you_mean(named[2], fields))
    allowed, _, got = what.removeprefix("Expected ").replace("`", "").partition(", got ")
    # Clients cannot say NaN or infinity in JSON; they say null.
    todo = "NaN and infinity come as null" if known and value is None and allowed == "float" else ""
    unseen = f"(of type {got})" if got else "(not shown)"
    return InvalidField(field, value if known else unseen, allowed[:1].lower() + allowed[1:], todo)


def _fields_at(kind: Any, path: list[str]) -> list[str]:
    """The field names of the Struct that the path leads to, through optional and list types."""
    kind = next(_structs(kind), None)
    for name in path:
        types = {f.encode_name: f.type for f in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        kind = next(_structs(types.get(name)), None)
    return [f.encode_name for f in msgspec.structs.fields(kind)] if _is_struct(kind) else []


def _structs(kind: Any) -> Iterator[Any]:
    if _is_struct(kind):
        yield kind
    for argument in get_args(kind):
        yield from _structs(argument)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _not_finite(value: Any, field: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield field or "the body", value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _not_finite(inner, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, f"{field}[{i}]")
