"""Strict JSON: an unknown field, a wrong type or a value out of bounds becomes an error that says what is allowed."""

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, TypeVar, get_args

import msgspec

from knapper.errors import InvalidField, KnapperError, UserError
from knapper.text.suggestions import did_you_mean
from knapper.wire.untrusted import parsing

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")
_MESSAGE = re.compile(r"^(?P<problem>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")
_WHERE = re.compile(r" \(byte (\d+)\)$")
_SHOWN_BYTES_MAX = 64 * 1024  # of a body whose wrong value is shown: that takes decoding it once more
_NAMED = re.compile(r"^Object (contains unknown|missing required) field `(.*)`$", re.DOTALL)


def decode(body: bytes, kind: type[S]) -> S:
    """The request, every field checked. Raises UserError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), _content(body), kind) from error
    except KnapperError:  # a request's own check of a field
        raise
    except Exception as error:  # any error, as in knapper.wire.untrusted
        with parsing(partial(_not_json, body)):
            for field, value in _not_finite(loads(body)) if len(body) <= _SHOWN_BYTES_MAX else _bare(body, str(error)):
                raise InvalidField(field, value, "a finite number") from error
            raise error


def _bare(body: bytes, error: str) -> Iterator[tuple[str, str]]:
    """(position, value) of NaN or infinity at the byte that the error names."""
    if (at := _WHERE.search(error)) and (value := _NOT_FINITE.match(body, int(at[1]))):
        yield f"the body at byte {at[1]}", value[0].decode()


_UNDECODED: Final = object()  # in place of a body that is too large to find its wrong value


def _content(body: bytes) -> Any:
    return loads(body) if len(body) <= _SHOWN_BYTES_MAX else _UNDECODED


def convert(parameters: dict[str, str], kind: type[S]) -> S:
    """The parameters of a query, checked as `decode` checks fields. Raises UserError."""
    try:
        return msgspec.convert(parameters, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(str(error), parameters, kind) from error


def shape(value: object, kind: type[T], at: str) -> T:
    """The decoded value of field `at`, checked. Raises InvalidField."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), value, kind, at) from error
    except UnicodeError as error:  # of a field's name, which Python's parser takes
        raise InvalidField(at, value, "JSON without halves of surrogate pairs") from error


def loads(body: bytes) -> Any:
    """Any JSON, NaN and Infinity included. Raises UserError, also for a repeated key in an object."""
    with parsing(partial(_not_json, body)):
        return _DECODER.decode(body.decode())


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidField(name, "there a second time", "each field once")
            seen.add(name)
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _not_json(body: bytes, error: Exception) -> UserError:
    return UserError(f"the body ({len(body)} bytes) is not JSON: {error}")


def _explain(message: str, content: Any, kind: Any, at: str = "") -> InvalidField:
    """The error for msgspec's `message` about `content`, which is the whole body, or its field `at`."""
    match = _MESSAGE.match(message)
    assert match is not None, "every part of the pattern may be empty"
    problem, steps = match["problem"], _STEP.findall(match["path"] or "")
    path = [at] if at else []
    path += [name or f"[{index or '...'}]" for name, index, _ in steps]
    field = ".".join(path).replace(".[", "[") or "the body"
    value, known = content, content is not _UNDECODED
    for name, index, _ in steps:
        try:
            value = value[name or int(index)]
        except (ValueError, KeyError, IndexError, TypeError):  # below a dict, whose key is not in msgspec's message
            known = False
            break
    if named := _NAMED.match(problem):
        inside = "" if field == "the body" else f"{field}."
        if named[1] == "missing required":
            return InvalidField(f"{inside}{named[2]}", None, "a value: this field is required")
        shown = value.get(named[2]) if known and isinstance(value, dict) else "(not shown)"
        fields = _fields_at(kind, [name for name, _, _ in steps if name])
        allowed = f"no field of this name, only {', '.join(fields) or 'the documented ones'}"
        return InvalidField(f"{inside}{named[2]}", shown, allowed, did_you_mean(named[2], fields))
    allowed, _, got = problem.removeprefix("Expected ").replace("`", "").partition(", got ")
    # Clients cannot say NaN or infinity in JSON; they say null.
    todo = "NaN and infinity come as null" if known and value is None and allowed == "float" else ""
    placeholder = f"(of type {got})" if got else "(not shown)"
    return InvalidField(field, value if known else placeholder, allowed[:1].lower() + allowed[1:], todo)


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
