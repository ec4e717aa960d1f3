"""JSON that is wrong: values of other kinds, at limits, nested too deep, named twice; and text that is none."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.fuzz.bodies import Ask, Text, World
from tests.fuzz.values import NUMBERS, SHAPES, TEXTS

Place = tuple[Any, Any]  # a container and a key of it


class Raw(bytes):
    """JSON as it stands, right or wrong."""


@dataclass
class Pairs:
    """An object whose keys may repeat."""

    pairs: list[tuple[Any, Any]]


def encode(value: Any) -> bytes:
    """The value as JSON; what no JSON is comes out as it is given."""
    match value:
        case Raw():
            return bytes(value)
        case bytes():
            return b'"' + value + b'"'
        case Pairs():
            return b"{" + b",".join(encode(key) + b":" + encode(inner) for key, inner in value.pairs) + b"}"
        case dict():
            return encode(Pairs(list(value.items())))
        case list():
            return b"[" + b",".join(map(encode, value)) + b"]"
        case Text():
            lines = b"\n".join(map(encode, value.values))
            return encode(lines.decode("utf-8", "surrogateescape"))
        case str():
            return _text(value)
        case bool() | None:
            return {True: b"true", False: b"false", None: b"null"}[value]
        case _:
            return repr(value).encode()


def _text(value: str) -> bytes:
    escaped = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    out = "".join(escaped.get(each) or (each if each >= " " else f"\\u{ord(each):04x}") for each in value)
    return b'"' + out.encode("utf-8", "surrogatepass") + b'"'


def deep(rng: Random) -> bytes:
    """Nested so deep that some reader of it gives up, and perhaps not the first."""
    depth = rng.choice([30, 200, 490, 900, 990, 1100, 5000, 50_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return opening * depth + b"1" + closing * depth


def _scalar(rng: Random) -> Raw:
    if rng.random() < 0.08:
        return Raw(deep(rng))
    return Raw(rng.choice([rng.choice(NUMBERS), encode(rng.choice(TEXTS)), rng.choice(SHAPES)]))


def _places(value: Any) -> Iterator[Place]:
    """Every place inside where something stands."""
    if isinstance(value, Text):
        value = value.values
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _mutate_value(value: Any, world: World, rng: Random) -> Any:
    """Another value of the same kind as `value`, or of another kind."""
    alike: list[Callable[[], Any]] = [lambda: _scalar(rng)]
    match value:
        case bool():
            alike.append(lambda: Raw(rng.choice([b"0", b"1", b'"true"', b"null", b"2"])))
        case int() | float():
            alike += [lambda: Raw(rng.choice(NUMBERS)), lambda: value + rng.choice([-1, 1, 10**6]), lambda: str(value)]
        case str():
            alike += [
                lambda: rng.choice(TEXTS),
                lambda: named(value, world, rng),
                lambda: value + rng.choice(["\x00", " ", "/x"]),
            ]
        case list():
            alike += [list, lambda: value * rng.choice([2, 50, 5000]), lambda: value[:-1], lambda: [value]]
        case dict():
            alike += [lambda: _pairs(value, world, rng), dict, lambda: [value]]
    return rng.choice(alike)()


def _pairs(value: dict[str, Any], world: World, rng: Random) -> Pairs:
    """With a key more, a key less, or one twice."""
    pairs = list(value.items())
    key = rng.choice(list(value) or ["a"])
    match rng.randrange(4):
        case 0:
            return Pairs([pair for pair in pairs if pair[0] != key])
        case 1:
            pairs.insert(rng.randint(0, len(pairs)), (rng.choice(["colour", key.upper(), *TEXTS]), _scalar(rng)))
        case 2:
            pairs.append((key, _mutate_value(value.get(key), world, rng)))
        case _:
            pairs += [(f"k{n}", n) for n in range(rng.choice([33, 65, 2000]))]
    return Pairs(pairs)


def named(value: str, world: World, rng: Random) -> str:
    """Another object's name in the place of the sender's own: a neighbour's, or one that nobody has."""
    other = rng.choice([world.theirs, world.theirs, world.never])
    for mine, name in zip(world.mine.ids(), other.ids(), strict=True):
        if mine in value:
            return value.replace(mine, rng.choice([name, mine + "0", mine.upper(), mine[:-1]]))
    return rng.choice([other.session, other.run, other.path(), other.sampler, other.sample])


def value(ask: Ask, world: World, rng: Random) -> None:
    places = list(_places(ask.body))
    if not places or rng.random() < 0.05:
        ask.body = _mutate_value(ask.body, world, rng)
        return
    container, key = rng.choice(places)
    if isinstance(container, dict) and rng.random() < 0.15:
        del container[key]
    else:
        container[key] = _mutate_value(container[key], world, rng)


def text(ask: Ask, world: World, rng: Random) -> None:
    """The text itself: cut, doubled, with a byte changed, or in another encoding."""
    data = encode(ask.body)
    ask.body = cut(rng.choice([data, data.decode("utf-8", "replace").encode("utf-16")]), rng)


def cut(data: bytes, rng: Random) -> bytes:
    at = rng.randint(0, len(data))
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(1) + data[at + 1 :]
        case 2:
            return data[at:]
        case 3:
            return data[:at] + data[at // 2 : at] + data[at:]
        case _:
            return data
