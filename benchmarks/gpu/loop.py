"""Loops over the journal on this machine's disk: durable operations, saves, a GRPO step. Without HTTP and the SDK."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np

from benchmarks.figures import Figure
from benchmarks.gpu.rig import ADAM, Rig, noted, prompts, rate, texts
from knapper.ids import TinkerPath
from knapper.jobs.run_client import RunClient
from knapper.state.checkpoints import Checkpoints
from knapper.wire.types import Datum, SampleOutput, SampleRequest, SamplingParams

_SECTION = "through the journal, on disk"


def durable(rig: Rig) -> Iterator[Figure]:
    """A step that is answered once it is durable, of one run and of several; a step alone; saves."""
    data = texts(rig.sizes.packed, 0)
    client = rig.client(1)

    async def step() -> None:
        await client.forward_backward(data, "cross_entropy", {})
        await client.optim_step(ADAM)

    took_s = _median_s(rig, step)
    tokens = sum(rig.sizes.packed)
    yield rate(
        _SECTION,
        f"a run's steps of {tokens:,} tokens",
        tokens,
        took_s,
        ">= 7,000, goal 10,000",
        "12,400",
        f"a step {took_s:.3f} s",
    )
    yield from _of_tenants(rig)
    yield _ms("an optimizer step, durable", _median_s(rig, lambda: client.optim_step(ADAM)), "<= 500, goal 100", "30")
    number = iter(range(10**6))
    yield _ms("weights saved for a sampler", _median_s(rig, lambda: client.save_for_sampler(f"s{next(number)}")))
    yield _ms("a state saved, with the optimizer", _median_s(rig, lambda: client.save(f"c{next(number)}")))


def _of_tenants(rig: Rig) -> Iterator[Figure]:
    clients = [rig.client(10 + n) for n in range(len(rig.sizes.tenants))]
    data = [texts(lengths, n) for n, lengths in enumerate(rig.sizes.tenants)]

    async def step(client: RunClient, of_run: Sequence[Datum]) -> None:
        await client.forward_backward(of_run, "cross_entropy", {})
        await client.optim_step(ADAM)

    async def all_of_them() -> None:
        await asyncio.gather(*(step(client, of_run) for client, of_run in zip(clients, data, strict=True)))

    took_s = _median_s(rig, all_of_them)
    tokens = sum(map(sum, rig.sizes.tenants))
    goals = ">= 5,000, goal 9,000", "within 10 % of one run"
    yield rate(_SECTION, f"{len(clients)} runs' steps of {tokens:,} tokens in all", tokens, took_s, *goals)


def grpo(rig: Rig) -> Iterator[Figure]:
    """Save, sample a group for each prompt, train on all of them, step: by stage."""
    sizes, client = rig.sizes, rig.client(2)
    checkpoints = Checkpoints(rig.engine.job_services.store, rig.engine.job_services.clock)
    asked = prompts(sizes.groups, sizes.prompt, seed=5)
    params = SamplingParams(max_tokens=sizes.drawn, ignore_eos=True)
    stages: dict[str, float] = {}

    async def staged(name: str, stage: Awaitable[object]) -> object:
        began = time.perf_counter()
        result = await stage
        stages[name] = time.perf_counter() - began
        return result

    async def draw(adapter: str) -> list[SampleOutput]:
        requests = [
            SampleRequest(sizes.name, adapter, prompt, params, seed=n, num_samples=sizes.samples)
            for n, prompt in enumerate(asked)
        ]
        return list(await asyncio.gather(*(rig.engine.sampler.sample(each) for each in requests)))

    async def iterate(round_number: int) -> None:
        path = str(await staged("save", client.save_for_sampler(f"round-{round_number}")))
        adapter = (await checkpoints.own(TinkerPath.parse(path), "local")).bundle
        outputs = await staged("sample", draw(adapter))
        assert isinstance(outputs, list)
        data = [
            _rollout(prompt, sequence.tokens, sequence.logprobs, 1.0 if n % 2 else -1.0)
            for prompt, output in zip(asked, outputs, strict=True)
            for n, sequence in enumerate(output.sequences)
        ]
        await staged("train", client.forward_backward(data, "importance_sampling", {}))
        await staged("step", client.optim_step(ADAM))

    rounds = iter(range(10**6))
    with rig.peak() as peak:
        took_s = _median_s(rig, lambda: iterate(next(rounds)))
        parts = ", ".join(f"{name} {stage_s:.2f} s" for name, stage_s in stages.items())
        name = f"GRPO step: {sizes.groups} prompts of {sizes.prompt}, {sizes.samples} samples of {sizes.drawn}"
        yield Figure("reinforcement", name, took_s, None, "s", note=noted(parts, peak()))


def _rollout(prompt: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, advantage: float) -> Datum:
    whole = np.concatenate([prompt, tokens]).astype(np.int64)
    before = len(prompt) - 1
    inputs: dict[str, np.ndarray] = {
        "target_tokens": whole[1:],
        "logprobs": np.concatenate([np.zeros(before), logprobs]).astype(np.float32),
        "advantages": np.concatenate([np.zeros(before), np.full(len(tokens), advantage)]).astype(np.float32),
    }
    return Datum(whole[:-1].astype(np.int32), inputs)


def _median_s(rig: Rig, one: Callable[[], Awaitable[object]]) -> float:
    return rig.median_s(lambda: rig.run(one))


def _ms(name: str, took_s: float, goal: str = "", stretch: str = "") -> Figure:
    return Figure(_SECTION, name, 1000 * took_s, None, "ms", None, goal, stretch)
