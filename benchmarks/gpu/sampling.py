"""Prefill and decoding by the engine's own sampler, and how far its log-probabilities are from the trainer's."""

import asyncio
import time
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.figures import Figure
from benchmarks.gpu.rig import Rig, noted, prompts, rate, request
from knapper.engine.sampling.sampler import EngineSampler
from knapper.errors import KnapperError
from knapper.wire.types import Datum, SampleOutput, SampleRequest, SamplingParams

_SECTION = "sampling"
_GOALS = {(256, 8): (">= 4,000, goal 9,000", "12,000"), (256, 4): (">= 4,000, goal 9,000", "12,000")}


def cells(rig: Rig) -> Iterator[Figure]:
    """Prefill and decoding of 1 to 256 texts with 1 to 32 adapters; what does not fit the card is said, and skipped."""
    sizes = rig.sizes
    adapters = rig.adapters(max(sizes.adapters))
    sampler = rig.sampler(adapters, max(sizes.texts))
    for count in sizes.texts:
        for used in (used for used in sizes.adapters if used <= count):
            names = list(adapters)[:used]
            _draw(rig, sampler, names, count, 2, seed=0)  # kernels of these shapes
            yield from _cell(rig, sampler, names, count)


def _cell(rig: Rig, sampler: EngineSampler, names: Sequence[str], count: int) -> Iterator[Figure]:
    sizes, label = rig.sizes, f"{count} texts, {len(names)} adapters"
    try:
        with rig.peak() as peak:
            prefill_s = _draw(rig, sampler, names, count, 1, seed=1)
            both_s = _draw(rig, sampler, names, count, 1 + sizes.drawn, seed=2)
    except KnapperError as error:
        yield Figure(_SECTION, f"decode: {label}", 0.0, None, "tok/s", note=f"does not fit: {error}")
        return
    steps_ms = 1000 * (both_s - prefill_s) / sizes.drawn
    yield rate(_SECTION, f"prefill: {label}, prompts of {sizes.prompt}", count * sizes.prompt, prefill_s, note=peak())
    decoded_s = max(1e-9, both_s - prefill_s)
    goal = _GOALS.get((count, len(names)), ("", ""))
    yield rate(
        _SECTION, f"decode: {label}", count * sizes.drawn, decoded_s, *goal, noted(f"a step {steps_ms:.1f} ms", peak())
    )  # fmt: skip


def _draw(rig: Rig, sampler: EngineSampler, names: Sequence[str], count: int, tokens: int, seed: int) -> float:
    """Seconds until `count` texts, with new prompts, have `tokens` each."""
    requests = [
        _request(prompt, names[n % len(names)], tokens, n)
        for n, prompt in enumerate(prompts(count, rig.sizes.prompt, seed * 1000 + 7 * count + len(names)))
    ]

    async def all_of_them() -> None:
        await asyncio.gather(*(sampler.sample(each) for each in requests))

    began = time.perf_counter()
    rig.run(all_of_them)
    return time.perf_counter() - began


def _request(prompt: np.ndarray, adapter: str, tokens: int, seed: int) -> SampleRequest:
    return SampleRequest("", adapter, prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), seed=seed)


def agreement(rig: Rig) -> Iterator[Figure]:
    """The sampler's log-probabilities of what it drew, against the trainer's of the same tokens and weights."""
    state = rig.state()
    sampler = rig.sampler({"adapter": rig.adapter(state)}, 64)
    asked = prompts(min(8, max(rig.sizes.texts)), rig.sizes.prompt, seed=3)

    async def draw() -> list[SampleOutput]:
        requests = (_request(prompt, "adapter", rig.sizes.drawn, n) for n, prompt in enumerate(asked))
        return list(await asyncio.gather(*(sampler.sample(each) for each in requests)))

    outputs = rig.run(draw)
    data = [_scored(prompt, output) for prompt, output in zip(asked, outputs, strict=True)]
    of_pass = request(data, state.spec.run, forward_only=True)
    _, scored, _ = rig.scheduler.submit(state, lambda: of_pass).result()
    gaps = np.concatenate([
        output.sequences[0].logprobs - by_datum["logprobs"][len(prompt) - 1 :]
        for prompt, output, by_datum in zip(asked, outputs, scored.outputs, strict=True)
    ])  # fmt: skip
    note = f"mean size {np.abs(gaps).mean():.1e}, largest {np.abs(gaps).max():.1e}, {len(gaps)} tokens"
    goal, stretch = "<= 0.001, goal 0.0002", "0 if deterministic"
    yield Figure(
        "agreement",
        "sampler : trainer, mean difference (k1)",
        float(gaps.mean()),
        None,
        "",
        None,
        goal,
        stretch,
        None,
        note,
    )


def _scored(prompt: np.ndarray, output: SampleOutput) -> Datum:
    """Every token of the prompt and the answer as a target."""
    whole = np.concatenate([prompt, output.sequences[0].tokens]).astype(np.int64)
    inputs: dict[str, np.ndarray] = {"target_tokens": whole[1:], "weights": np.ones(len(whole) - 1, np.float32)}
    return Datum(whole[:-1].astype(np.int32), inputs)
