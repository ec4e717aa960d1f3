"""Values that may go from one cell to the other: plain data of exactly these types, as JSON. None of it runs."""

from typing import Any

from knapper import limits

_ATOMS = (type(None), bool, float, str)


class NotPlain(TypeError):
    """The value has a type that cannot be sent."""


class TooDeep(NotPlain):
    """The value is nested too deeply to be sent."""


def pack(value: object, depth: int = 0) -> Any:
    """Raises NotPlain. Exact types: a subclass could behave as it likes on the other side."""
    kind = type(value)
    if depth > limits.value_depth_max:
        raise TooDeep(f"nested deeper than {limits.value_depth_max}")
    if kind in _ATOMS:
        return value
    match value:
        case int():
            packed: Any = hex(value)
        case complex():
            packed = [value.real, value.imag]
        case bytes():
            packed = value.hex()
        case dict():
            packed = [[pack(key, depth + 1), pack(each, depth + 1)] for key, each in value.items()]
        case list() | tuple() | set() | frozenset():
            packed = [pack(each, depth + 1) for each in value]
        case _:
            raise NotPlain(f"{kind.__name__} is not plain data")
    if kind.__name__ not in _UNPACK or kind.__module__ != "builtins":
        raise NotPlain(f"{kind.__name__} is not plain data")
    return [kind.__name__, packed]


def unpack(packed: Any) -> Any:
    """The value. Raises some Exception, of any class, for anything that `pack` did not make."""
    if type(packed) in _ATOMS:
        return packed
    kind, content = packed
    return _UNPACK[kind](content)


_UNPACK: dict[str, Any] = {
    "int": lambda content: int(content, 16),
    "complex": lambda content: complex(float(content[0]), float(content[1])),
    "bytes": bytes.fromhex,
    "dict": lambda content: {unpack(key): unpack(value) for key, value in content},
    "list": lambda content: [unpack(each) for each in content],
    "tuple": lambda content: tuple(unpack(each) for each in content),
    "set": lambda content: {unpack(each) for each in content},
    "frozenset": lambda content: frozenset(unpack(each) for each in content),
}


def holds_nan(value: Any) -> bool:
    """Whether something in it is not a number. `value`: what `unpack` gives."""
    if isinstance(value, dict):
        return any(holds_nan(key) or holds_nan(each) for key, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(holds_nan, value))
    return isinstance(value, float | complex) and value != value
