"""zstd bodies: whole ones come back, bombs do not."""

import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from knapper import limits
from knapper.errors import TooLarge, UserError
from knapper.wire import zstd


def test_what_was_compressed_comes_back() -> None:
    for data in (b"", b"x", bytes(range(256)) * 5000):
        assert zstd.decompress(zstd.compress(data)) == data


def test_frames_without_a_size_and_several_frames_come_back() -> None:
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 100)
    assert zstd.decompress(sizeless) == b"abc" * 100
    assert zstd.decompress(sizeless + zstd.compress(b"def")) == b"abc" * 100 + b"def"


def test_the_cap_holds_at_the_limit_and_one_past_it() -> None:
    data = zstd.compress(b"a" * 1000)
    assert len(zstd.decompress(data, 1000)) == 1000
    with pytest.raises(TooLarge, match="999"):
        zstd.decompress(data, 999)
    assert zstd.decompress_prefix(data, 10) == (b"a" * 10, True)
    assert zstd.decompress_prefix(data, 1000) == (b"a" * 1000, False)


@pytest.mark.parametrize("states_its_size", [True, False])
def test_a_bomb_costs_little_memory(states_its_size: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=19, write_content_size=states_its_size)
    bomb = compressor.compress(bytes(256 * limits.MIB))
    assert len(bomb) < 64 * 1024
    tracemalloc.start()
    with pytest.raises(TooLarge):
        zstd.decompress(bomb, limits.MIB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * limits.MIB


def test_a_cut_or_broken_body_is_a_user_error() -> None:
    data = zstd.compress(bytes(range(256)) * 100)
    for broken in (b"", data[:-1], data[:5], b"not zstd at all", data + b"rubbish"):
        with pytest.raises(UserError):
            zstd.decompress(broken)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_frames_raise_only_user_errors(data: st.DataObject) -> None:
    body = bytearray(zstd.compress(bytes(range(200)) * 3))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        zstd.decompress(bytes(body), 10_000)
    except UserError:
        pass
