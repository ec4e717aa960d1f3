"""How legal requests are made wrong: each mutation knows what it mutates, and takes a bit of it."""

import base64
import copy
from collections.abc import Callable
from random import Random
from urllib.parse import quote

import zstandard
from google.protobuf.message import Message

from tests.fuzz import json_body, protobuf_body
from tests.fuzz.bodies import Ask, World
from tests.fuzz.json_body import Raw, cut, deep, encode, named
from tests.fuzz.values import HEADERS, NUMBERS, TEXTS


def header(ask: Ask, world: World, rng: Random) -> None:
    name = rng.choice(list(HEADERS))
    ask.headers[name] = rng.choice(HEADERS[name])


def token(ask: Ask, world: World, rng: Random) -> None:
    """Something that begins as a token does, and is signed by nobody."""
    heads = [
        b'{"alg":"HS256"}',
        b'{"alg":"none"}',
        b'{"alg":1}',
        b'{"a":' + deep(rng),
        b"{}",
        b'{"alg":"HS256","crit":["x"]}',
    ]
    parts = [rng.choice([*heads, *NUMBERS, b'{"\xff":1}']) for _ in range(rng.choice([1, 2, 3, 4]))]
    made = [base64.urlsafe_b64encode(b'{"' + part[2:]).rstrip(b"=").decode() for part in parts]
    ask.headers["X-API-Key"] = ".".join(made)[:30_000]


def query(ask: Ask, world: World, rng: Random) -> None:
    texts = [each for each in [*TEXTS, *NUMBERS] if len(each) < 8000]
    if ask.query and rng.random() < 0.7:
        at = rng.randrange(len(ask.query))
        ask.query[at] = (ask.query[at][0], rng.choice(texts))
        return
    names = ["limit", "offset", "access_scope", "day", "event_type", "colour", "", "limit[]"]
    ask.query.append((rng.choice(names), rng.choice(texts)))


def parameter(ask: Ask, world: World, rng: Random) -> None:
    name = rng.choice(list(ask.path))
    texts = [each for each in TEXTS if len(each) < 8000]
    ask.path[name] = rng.choice(
        [named(str(ask.path[name]), world, rng), rng.choice(texts), b"%00", b"%", b"%ff", b"%2e%2e%2f"]
    )


def compression(data: bytes, rng: Random) -> bytes:
    """A zstd frame, whole or not quite."""
    whole = zstandard.compress(data, 1)
    bomb = zstandard.compress(bytes(rng.choice([2**20, 65 * 2**20])), 1)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    kinds = [
        whole, whole, whole, unsized, whole[: rng.randint(0, len(whole))], whole + whole, whole + b"x",
        skippable + whole,
        skippable, b"", data, cut(whole, rng), zstandard.compress(whole), zstandard.compress(b"") + whole,
        whole[:4] + b"\xff" * 9 + whole[4:],
    ]  # fmt: skip
    return bomb if rng.random() < 0.03 else rng.choice(kinds)


Mutation = Callable[[Ask, World, Random], None]


def _fitting(ask: Ask) -> list[Mutation]:
    """Those for what the request has, the more likely the more often."""
    choices: list[Mutation] = [header]
    choices += [token] if "ce-type" not in ask.headers else []
    choices += [query] * (3 if ask.query else 1)
    choices += [parameter] * (4 if ask.path else 0)
    if isinstance(ask.body, Message):
        choices += [protobuf_body.field] * 20 + [protobuf_body.wire] * 8
    elif ask.body is not None and not isinstance(ask.body, bytes):
        choices += [json_body.value] * 30 + [json_body.text] * 2
    return choices


def mutate(ask: Ask, world: World, rng: Random) -> Ask:
    """The request, changed in one to three ways; one in eight stays as it is."""
    ask = copy.deepcopy(ask)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 3])):
        rng.choice(_fitting(ask))(ask, world, rng)
    return ask


def body_of(ask: Ask) -> bytes:
    """The body, before it is compressed."""
    if isinstance(ask.body, Message):
        return bytes(ask.body.SerializeToString())
    if isinstance(ask.body, bytes) and not isinstance(ask.body, Raw):
        return ask.body
    return b"" if ask.body is None else encode(ask.body)


def content(ask: Ask, rng: Random) -> tuple[dict[str, str], bytes]:
    """The headers and the body as they are sent."""
    headers, data = dict(ask.headers), body_of(ask)
    if data:
        if "Content-Encoding" not in headers and rng.random() < 0.15:
            headers["Content-Encoding"] = "zstd"
        if headers.get("Content-Encoding", "").lower() == "zstd":
            data = compression(data, rng)
    return headers, data


def path_of(way_path: str, ask: Ask) -> str:
    """The path and query of the URL, everything escaped that must be."""
    path = way_path
    for name, value in ask.path.items():
        shown = value.decode("latin-1") if isinstance(value, bytes) and value[:1] == b"%" else quote(value, safe="")
        path = path.replace(f"{{{name}}}", shown).replace(f"{{{name}:path}}", shown)
    pairs = "&".join(
        f"{quote(str(name))}={quote(value if isinstance(value, bytes) else str(value))}" for name, value in ask.query
    )
    return path + ("?" + pairs if pairs else "")
