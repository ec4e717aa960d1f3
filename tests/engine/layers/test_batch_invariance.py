"""Sampler and trainer give a token the same log-probability, to the last bit, on a CPU and in any batch.

So that the ratio of an on-policy step is 1, and not 1 and some noise.
"""

import asyncio
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from knapper.engine.executor import Executor
from knapper.engine.layers.lora import Lora
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.trainer import RunState
from knapper.wire.types import AdamW, Datum, SampleOutput, SampleRequest, SamplingParams
from tests.engine.runs import datum, done, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import AdapterDict
from tests.engine.training.test_scheduler import held

SEED = 4
BASE = ""
SPECS = {
    BASE: spec(run="base"),  # a new adapter changes nothing
    "narrow": spec(run="narrow", rank=4, train_unembed=True),
    "wide": spec(run="wide", rank=40, alpha=64.0, train_mlp=False),
    "head": spec(run="head", rank=16, alpha=8.0, train_attn=False, train_unembed=True),
}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Pair:
    """A trainer and a sampler on one model, with the same adapters."""

    def __init__(self, directory: Path, kind: str, dtype: torch.dtype) -> None:
        self.trainer = tiny_trainer(directory, kind, dtype)
        self.states = {name: self._trained(name) for name in SPECS}
        loras: dict[str, Lora] = {name: state.lora() for name, state in self.states.items() if name != BASE}
        self.device = Executor()
        weakref.finalize(self, self.device.close)
        self.sampler = EngineSampler(
            self.trainer.decoder,
            self.device,
            AdapterDict(loras),
            None,
            slots_max=24,
            kv_tokens_max=1 << 14,
            now=time.monotonic,
        )

    def _trained(self, name: str) -> RunState:
        state = self.trainer.create(SPECS[name])
        if name == BASE:
            return state
        data = [datum(40, "cross_entropy", np.random.default_rng(SEED))]
        state, _ = done(self.trainer.forward_backward(state, request(data)))
        return done(self.trainer.optim_step(state, AdamW(learning_rate=0.03)))[0]

    def sampled(self, *requests: SampleRequest) -> list[SampleOutput]:
        """All having arrived before the first begins."""
        gate = held(self.device)

        async def together() -> list[SampleOutput]:
            tasks = [asyncio.ensure_future(self.sampler.sample(sample_request)) for sample_request in requests]
            while self.sampler.waiting < len(requests):  # noqa: ASYNC110  no event tells
                await asyncio.sleep(0)
            gate.set()
            return list(await asyncio.gather(*tasks))

        return asyncio.run(asyncio.wait_for(together(), 60))

    def trained(self, name: str, sequences: list[np.ndarray], *, forward_only: bool = False) -> list[np.ndarray]:
        """The trainer's log-probabilities of each sequence's tokens after the first, all sequences in one request."""
        data = [
            Datum(token_ids[:-1].astype(np.int32), {"target_tokens": token_ids[1:].astype(np.int64),
                                               "weights": np.ones(len(token_ids) - 1, np.float32)})
            for token_ids in sequences
        ]  # fmt: skip
        requests = request(data, forward_only=forward_only)
        _, output = done(self.trainer.forward_backward(self.states[name], requests))
        return [datum_output["logprobs"] for datum_output in output.outputs]


@pytest.fixture(
    params=[("llama", torch.float32), ("llama", torch.bfloat16), ("qwen3", torch.float32)],
    ids=["llama float32", "llama bfloat16", "qwen3 float32"],
)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(tmp_path, *request.param)


def many_requests() -> list[SampleRequest]:
    """Sequences of many lengths with every adapter: in several pools, past 256 keys, one of a single token."""
    rng = np.random.default_rng(SEED)
    names = list(SPECS)
    shapes = [(1, 9), (7, 1), (9, 70), (40, 30), (63, 3), (64, 12), (130, 20), (250, 80), (383, 12), (66, 66)]
    return [
        SampleRequest(
            "tiny", names[index % len(names)], rng.integers(0, 256, prompt).astype(np.int32),
            SamplingParams(max_tokens=tokens, ignore_eos=True), seed=index, num_samples=1 + index % 3,
            prompt_logprobs=prompt > 1,
        )
        for index, (prompt, tokens) in enumerate(shapes)
    ]  # fmt: skip


def assert_equal(pair: Pair, requests: list[SampleRequest], outputs: list[SampleOutput]) -> None:
    for sample_request, output in zip(requests, outputs, strict=True):
        prompt = len(sample_request.prompt)
        sequences = [np.concatenate([sample_request.prompt, sequence.tokens]) for sequence in output.sequences]
        group = pair.trained(sample_request.adapter, sequences)
        for token_ids, sequence, logprobs in zip(sequences, output.sequences, group, strict=True):
            np.testing.assert_array_equal(sequence.logprobs, logprobs[prompt - 1 :])
            (alone,) = pair.trained(sample_request.adapter, [token_ids], forward_only=True)
            np.testing.assert_array_equal(alone, logprobs)
            if sample_request.prompt_logprobs:
                assert output.prompt_logprobs is not None
                np.testing.assert_array_equal(output.prompt_logprobs[1:], logprobs[: prompt - 1])


@pytest.mark.usefixtures("threads")
def test_sampled_and_prompt_logprobs_are_the_trainers_bit_for_bit(pair: Pair) -> None:
    requests = many_requests()
    outputs = pair.sampled(*requests)
    assert_equal(pair, requests, outputs)
    prompts = np.concatenate([sequence.logprobs for output in outputs for sequence in output.sequences])
    assert len(np.unique(prompts)) > 0.9 * len(prompts)


@pytest.mark.usefixtures("threads")
def test_a_conversation_that_goes_on_where_it_was_has_the_trainers_bits(pair: Pair) -> None:
    """Each turn begins with all that was said before, two of them with the same; other adapters say the same beside."""
    rng = np.random.default_rng(SEED)
    names = list(SPECS)
    prompts = {name: [rng.integers(0, 256, 45).astype(np.int32)] * 2 for name in names}
    prompts["wide"] = prompts["narrow"]  # tokens alone must not tell
    for turn in range(4):
        requests = [
            SampleRequest("tiny", name, prompt, SamplingParams(max_tokens=21, ignore_eos=True), seed=10 * turn + number)
            for name in names
            for number, prompt in enumerate(prompts[name])
        ]
        outputs = pair.sampled(*requests)
        assert_equal(pair, requests, outputs)
        if turn:
            assert all(output.prompt_cache_hit_tokens >= 45 + 51 * (turn - 1) for output in outputs)
        sequences = iter(
            np.concatenate([sample_request.prompt, output.sequences[0].tokens, rng.integers(0, 256, 30)]).astype(
                np.int32
            )
            for sample_request, output in zip(requests, outputs, strict=True)
        )
        prompts = {name: [next(sequences) for _ in prompts[name]] for name in names}


@pytest.mark.usefixtures("threads")
def test_prompts_that_begin_alike_have_the_trainers_bits(pair: Pair) -> None:
    """In one pass, and with the log-probabilities of the part that differs."""
    rng = np.random.default_rng(SEED)
    common = rng.integers(0, 256, 60).astype(np.int32)
    requests = [
        SampleRequest(
            "tiny", name, np.concatenate([common, rng.integers(0, 256, length).astype(np.int32)]),
            SamplingParams(max_tokens=5, ignore_eos=True), seed=length, prompt_logprobs=scored,
        )
        for name in ("narrow", BASE)
        for length, scored in ((1, False), (7, True), (50, False))
    ]  # fmt: skip
    outputs = pair.sampled(*requests)
    assert_equal(pair, requests, outputs)
    assert pair.sampler.counters.prefilled_tokens == 2 * (60 + 58)
    assert pair.sampler.counters.reused_tokens == 2 * 120
