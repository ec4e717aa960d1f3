"""Samples of models whose layers have states: reused, parked and half-made ones change no bit, and count as memory."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knapper.catalogue import servable
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.recurrent import CHUNK_ROWS
from knapper.engine.sampling.kv_cache import Cache
from knapper.errors import InvalidField
from knapper.settings import Settings
from tests.engine.faults import Operators, gpu_error, on
from tests.engine.sampling.test_kv_cache import random_kv, random_states
from tests.engine.sampling.test_scheduler import House, prompt_of, request, same
from tests.engine.strange import strange_model
from tests.engine.test_scarcity import alike, answers, nothing_left

KINDS = ["lfm2", "qwen3_5", "nemotron_h"]


def house_of(directory: Path, kind: str) -> House:
    return House(directory, make=partial(strange_model, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_goes_on_from_a_state_of_an_earlier_one_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    """From its end, or from one of a few places in what they have in common; rows that are asked for are computed."""
    house, prompt = house_of(tmp_path, kind), prompt_of(140)
    house.run(request(adapter="adapter-3", prompt=prompt[:100]))
    for tokens, scored, reused in ((prompt, None, 100), (prompt[:90], None, 64), (prompt, 50, 64), (prompt, 130, 0)):
        last: dict[str, Any] = {} if scored is None else {"prompt_logprobs": True, "prompt_logprobs_last_n": scored}
        entry = request(adapter="adapter-3", prompt=tokens, **last)
        (warm,), (cold,) = house.run(entry), house_of(tmp_path, kind).run(entry)
        assert (warm.prompt_cache_hit_tokens, cold.prompt_cache_hit_tokens) == (reused, 0)
        assert same(warm.sequences[0], cold.sequences[0])
        if scored is not None:
            assert warm.prompt_logprobs is not None
            assert cold.prompt_logprobs is not None
            np.testing.assert_array_equal(warm.prompt_logprobs, cold.prompt_logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_wherever_memory_is_lacking_for_a_moment_nothing_changes(tmp_path: Path, kind: str) -> None:
    """One operator after another fails once, while texts cross the end of a chunk: a half-made state is lost."""
    house = house_of(tmp_path, kind)
    requests = [
        request(adapter=["", "adapter-1"][n], prompt=prompt_of(CHUNK_ROWS - 4 + n, n), seed=n, max_tokens=10)
        for n in range(2)
    ]
    undisturbed = house.run(*requests)
    house.sampler._scheduler._prefiller.trim(0)
    counted = Operators(lambda _number, _name: False, gpu_error)
    with on(house.device, counted):
        house.run(*requests)
    for at in sorted(np.random.default_rng(5).integers(1, counted.count, 10).tolist()):
        house.sampler._scheduler._prefiller.trim(0)
        broken = Operators(lambda number, _name, at=at: number == at, gpu_error)  # type: ignore[misc]  # a default binds it
        with on(house.device, broken):
            outputs = house.within(answers(house, requests))
        assert broken.broken == 1
        assert alike(outputs, undisturbed), f"operator {at} of {counted.count}"
        assert nothing_left(house)


@torch.inference_mode()
def test_a_fold_that_breaks_loses_its_sequences_and_no_others(tmp_path: Path) -> None:
    config = ModelConfig.read(strange_model(tmp_path, "qwen3_5"))
    cache = Cache(config, torch.float32, torch.device("cpu"))
    lengths, failures = (CHUNK_ROWS, CHUNK_ROWS + 1), 0
    for number in range(1, 100):
        slots = [cache.add(random_kv(config, n, n), n, random_states(config, n)) for n in lengths]
        for slot in slots:
            slot.folded = 0  # as of a text that was decoded up to there
        broken = Operators(lambda count, _name, number=number: count == number, gpu_error)  # type: ignore[misc]  # as above
        try:
            with broken:
                cache.reserve()
        except torch.OutOfMemoryError:
            failures += 1
            assert [Cache.roll_back(slot, n) for slot, n in zip(slots, lengths, strict=True)] == [False, True]
        for slot in slots:
            cache.remove(slot)
        assert cache.tokens == 0
        if not broken.broken:
            break
    assert failures > 5


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_is_refused_for_it(tmp_path: Path, kind: str) -> None:
    directory = strange_model(tmp_path, kind)
    settings = Settings.load({"KNAPPER_MODEL_DIRECTORY": str(directory), "KNAPPER_SAMPLER": "vllm"})
    with pytest.raises(InvalidField, match=r"KNAPPER_SAMPLER.*(whose layers have states|a mixture)"):
        servable.expect_libraries(settings, "native")


@pytest.mark.parametrize("kind", KINDS)
def test_states_count_as_memory(tmp_path: Path, kind: str) -> None:
    """Of each sequence that decodes, and of each place that a cached prompt keeps one for."""
    house = house_of(tmp_path, kind)
    scheduler, decoder = house.sampler._scheduler, house.decoder
    state = sum(part.nbytes for layer in random_states(decoder.config, 0) for part in layer)
    extra = -(-state // decoder.bytes_per_token)
    assert extra > 0
    assert scheduler.positions(10) == 64 + extra
    assert scheduler.longest + extra <= 8192
    assert decoder.context_positions == decoder.config.context + extra
    house.run(request(prompt=prompt_of(100), max_tokens=1))
    assert scheduler._prefiller.cached_tokens == 100 + 2 * extra
