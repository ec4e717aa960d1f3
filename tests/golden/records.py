"""Files of every record in every format that was ever written. None is ever changed or deleted.

A new type, a new field or a new format needs a new file:  python -m tests.golden.records
"""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

import gateway
import knapper
from knapper.state.journal.records import Record, encode

FILES = Path(__file__).parent / "records"


def types() -> dict[str, type[Record]]:
    """Every type of record that the product has, by name."""
    for package in (knapper, gateway):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(("knapper.engine", "knapper._deployables")):
                importlib.import_module(module.name)
    found = list(_below(Record))
    by_name = {kind.__name__: kind for kind in found}
    assert len(by_name) == len(found), "two types of records have one name: tests/golden tells them apart by it"
    return by_name


def _below(root: type[Record]) -> Iterator[type[Record]]:
    for child in root.__subclasses__():
        if child.__module__.partition(".")[0] in ("knapper", "gateway", "functions"):
            yield child
            yield from _below(child)


def files(name: str) -> list[Path]:
    """Of one type, the oldest first."""
    return sorted(FILES.glob(f"{name}-*.msgpack"))


def full(kind: type[msgspec.Struct]) -> Any:
    """One of this type, no field of which has its default."""
    hints = get_type_hints(kind)
    values = {
        field.name: field.default if field.name == "v" else _value(hints[field.name], f"{field.name}")
        for field in msgspec.structs.fields(kind)
    }
    for field in msgspec.structs.fields(kind):
        if isinstance(field.default, bool):
            values[field.name] = not field.default
    return kind(**values)


def _value(hint: Any, name: str) -> Any:
    """Something of the type, made from the name of the field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return arguments[-1]
    if origin in (Union, type(int | None)):
        return _value(next(each for each in arguments if each is not type(None)), name)
    if origin is list:
        return [_value(arguments[0], name)]
    if origin is tuple:
        return tuple(_value(each, name) for each in arguments if each is not Ellipsis)
    if origin is dict:
        return {name: _value(arguments[1], name)}
    if hasattr(hint, "__supertype__"):
        return _value(hint.__supertype__, name)
    if origin is not None:  # Annotated
        return _value(arguments[0], name)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return full(hint)
    number = 7 + len(name)
    simple: dict[Any, Any] = {
        str: f"some {name}", bytes: name.encode(), bool: True, int: number, float: number + 0.5, Any: name,
    }  # fmt: skip
    return simple[hint]


def main() -> None:
    FILES.mkdir(exist_ok=True)
    for name, kind in sorted(types().items()):
        data, before = encode(full(kind)), files(name)
        if not before or before[-1].read_bytes() != data:
            path = FILES / f"{name}-{len(before) + 1:03d}.msgpack"
            path.write_bytes(data)
            print(path.relative_to(Path.cwd()))


if __name__ == "__main__":
    main()
