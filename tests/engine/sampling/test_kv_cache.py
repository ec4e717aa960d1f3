"""Keys and values stay what they are, wherever they move, and take no more memory than they may."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from knapper.engine.layers.paged_attention import PAGE
from knapper.engine.layers.recurrence import State
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.loader import load
from knapper.engine.models.prefill import Past
from knapper.engine.sampling.kv_cache import Cache, Slot, bytes_per_token, context_positions
from tests.engine.faults import Operators, gpu_error
from tests.engine.strange import strange_model
from tests.engine.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    config = ModelConfig.read(tiny_model(tmp_path))
    return replace(config, layers=3 * config.layers, context=1000)


@pytest.fixture(params=["llama", "lfm2"])
def any_config(request: pytest.FixtureRequest, tmp_path: Path, config: ModelConfig) -> ModelConfig:
    """Of attention alone, and one of whose layers half have a state."""
    if request.param == "llama":
        return config
    hybrid = ModelConfig.read(strange_model(tmp_path / "hybrid", request.param))
    return replace(hybrid, layers=3 * hybrid.layers, context=1000)


def cache_of(config: ModelConfig, positions_max: int | None = None) -> Cache:
    return Cache(config, torch.float32, CPU, positions_max)


def random_kv(config: ModelConfig, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    layers, *heads = config.kv_shape
    return torch.randn(layers, 2, length, *heads, generator=generator)


def random_states(config: ModelConfig, seed: int) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(shape, generator=generator) for shape in mixer.state_shapes) for mixer in config.recurrent
    ]


def in_order(cache: Cache, layer: int, slot: Slot) -> Tensor:
    """(2, length, G, D)."""
    pages = torch.stack([pages[slot.pages] for pages in cache.pages.layer(layer)])
    return pages.transpose(2, 3).flatten(1, 2)[:, : slot.length]


def expect_kept(cache: Cache, slot: Slot, kv: Tensor, states: list[State], what: str) -> None:
    for layer, layer_kv in enumerate(kv):
        assert torch.equal(in_order(cache, layer, slot), layer_kv), what
    for layer, state in enumerate(states):
        kept = [places[cache.rows.index(slot)] for places in cache.states.layer(layer)]
        assert all(torch.equal(*parts) for parts in zip(kept, state, strict=True)), what


def grow(cache: Cache, slot: Slot, more: Tensor) -> None:
    """As steps do: the page has room for it, and what comes after is finite."""
    for layer, layer_kv in enumerate(more):
        for pages, tokens_TGD in zip(cache.pages.layer(layer), layer_kv, strict=True):
            start = slot.length % PAGE
            assert pages[slot.pages[-1]].isfinite().all()
            pages[slot.pages[-1], :, start : start + len(tokens_TGD)] = tokens_TGD.transpose(0, 1)
    slot.length += more.shape[2]


class Held(TorchDispatchMode):
    """Bytes of the tensors of pages (places, G, C, D) that are still there, and the most that they ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library has no types here
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and made.dim() == 4 and made.shape[2] == PAGE:
            self.bytes += made.nbytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(made, self._left, made.nbytes)
        return made

    def _left(self, nbytes: int) -> None:
        self.bytes -= nbytes


def test_a_text_takes_whole_pages_and_no_more(config: ModelConfig) -> None:
    cache = cache_of(replace(config, context=40_960))
    assert [cache.positions(length) for length in (1, 64, 65, 32_768, 32_769, 40_960)] == [
        64, 64, 128, 32_768, 32_832, 40_960
    ]  # fmt: skip
    assert cache.longest == 40_960
    assert cache_of(config).longest == context_positions(config) == 1024
    assert cache_of(config, 700).longest == 640
    assert cache_of(config, 63).longest == 0


def test_bytes_are_counted_in_the_dtype_in_which_keys_and_values_are_kept(tmp_path: Path) -> None:
    """On a CPU that is float32, whatever the base weights' is."""
    directory = tiny_model(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(directory, dtype)
        decode_state = model.decode_state(1 << 14)
        with Held() as held:
            decode_state.add(Past(random_kv(ModelConfig.read(directory), 64, seed=1)), 64)
        assert held.bytes == 64 * model.bytes_per_token, "a page"
        assert model.bytes_per_token == 2 * 2 * 2 * 16 * 4


@torch.inference_mode()
def test_sequences_grow_and_leave_within_the_memory_and_keep_what_they_are(any_config: ModelConfig) -> None:
    """Seeded stories of sequences that begin, grow and leave, as full as the memory lets them be."""
    config, layers = any_config, len(any_config.attention)
    one_layer = bytes_per_token(config, torch.float32) // layers
    for seed in range(2 if config.recurrent else 6):
        rng = np.random.default_rng(seed)
        positions_max = int(rng.choice([1024, 1500, 2048, 4096]))
        with Held() as held:
            cache = cache_of(config, positions_max)
            decoding: dict[Slot, tuple[Tensor, list[State], int]] = {}  # its keys and values, its states, its end
            for step in range(150):
                length, end = sorted(rng.integers(1, min(1000, cache.longest) + 1, 2).tolist())
                if cache.tokens + cache.positions(length) <= positions_max:
                    kv = random_kv(config, length, seed=1000 * seed + step)
                    states = random_states(config, seed=1000 * seed + step)
                    decoding[cache.add(kv, length, states)] = kv, states, end
                for slot, (_, _, end) in list(decoding.items()):
                    short = sum(cache.positions(each.length + 1) for each in decoding) > positions_max
                    if slot.length == end or rng.random() < 0.01 or short:
                        cache.remove(slot)
                        del decoding[slot]
                cache.reserve()
                jump = int(rng.integers(1, 60))
                for slot, (kv, states, end) in list(decoding.items()):
                    grown = min(end, slot.length + jump, len(slot.pages) * PAGE)
                    more = random_kv(config, grown - slot.length, seed=step)
                    grow(cache, slot, more)
                    decoding[slot] = torch.cat([kv, more], dim=2), states, end
                for slot, (kv, states, _) in decoding.items():
                    expect_kept(cache, slot, kv, states, f"seed {seed}, step {step}")
                assert cache.tokens == sum(cache.positions(slot.length) for slot in decoding), "no more than is used"
                assert cache.tokens <= cache.allocated <= positions_max
        assert held.peak <= (positions_max * layers + positions_max) * one_layer, "and one layer, while it grows"


def test_a_lone_text_grows_to_all_that_there_is(config: ModelConfig) -> None:
    """In small parts: twice as much is never there at once."""
    with Held() as held:
        cache = cache_of(config, context_positions(config))
        slot = cache.add(random_kv(config, 700, seed=1), 700)
        for _ in range(300):
            cache.reserve()
            slot.length += 1
    assert len(slot.pages) == 16
    assert held.peak <= 1.3 * 1024 * bytes_per_token(config, torch.float32)


@pytest.mark.parametrize("positions_max", [None, 1216, 4096])
def test_wherever_growing_breaks_all_are_as_they_were(any_config: ModelConfig, positions_max: int | None) -> None:
    """It fails at each of its operators in turn."""
    config, lengths, number = any_config, [100, 192, 150], 0
    while True:
        number += 1
        cache = cache_of(config, positions_max)
        contents = [random_kv(config, length, seed=length) for length in lengths]
        states = [random_states(config, seed=length) for length in lengths]
        slots = [cache.add(*each) for each in zip(contents, lengths, states, strict=True)]
        cache._trim()
        broken = Operators(lambda count, _name, number=number: count == number, gpu_error)  # type: ignore[misc]
        try:
            with broken:
                cache.reserve()
        except torch.OutOfMemoryError:
            assert cache.tokens == sum(map(cache.positions, lengths))
        if not broken.broken:
            break
        for slot, kv, length, state in zip(slots, contents, lengths, states, strict=True):
            assert Cache.roll_back(slot, length)
            expect_kept(cache, slot, kv, state, f"operator {number}")
        cache.reserve()
        again = cache.add(contents[0], 100, states[0])
        expect_kept(cache, again, contents[0], states[0], "afterwards")
        assert cache.rows.count(again) == 1
    assert number > 4 * len(config.layers)
