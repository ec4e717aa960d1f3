"""Samples through the whole server, against transformers' generate."""

from collections.abc import Callable, Iterator
from functools import partial

import tinker
from tinker import types

from benchmarks.bare import Bare
from benchmarks.figures import Figure, faster, paired, seconds
from benchmarks.served import Setting
from benchmarks.train_steps import texts

PROMPT = 64


def measure(setting: Setting) -> Iterator[Figure]:
    bare, tokens = Bare(setting.directory), 16 if setting.quick else 32
    alone = 2 if setting.quick else 8  # texts generated one by one; the time of more is extrapolated
    trained = setting.training_client().save_weights_and_get_sampling_client().result()
    for count, goal, by_hand in ((8, (">= 7x", "14x"), (">= 1.4x", "2x")), (32, (">= 15x", "30x"), None)):
        if setting.quick and count > 8:
            continue
        prompts = texts([PROMPT] * count, seed=count)
        ours = _ours(trained, prompts, tokens)
        pair = paired(ours, _one_by_one(bare, prompts[:alone], tokens), setting.repeats(2))
        pair = pair._replace(bare_s=pair.bare_s * count / alone)
        name = f"{count} samples of {tokens} tokens at once"
        yield faster("sampling", f"{name}, generate one by one", pair, *goal)
        if by_hand:
            pair = paired(ours, partial(bare.generate, prompts, tokens), setting.repeats(5))
            yield faster("sampling", f"{name}, generate batched", pair, *by_hand)
    yield _many_requests(setting)


def _ours(sampler: tinker.SamplingClient, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])

    def run() -> None:
        inputs = [types.ModelInput.from_ints(prompt) for prompt in prompts]
        futures = [sampler.sample(model_input, num_samples=1, sampling_params=params) for model_input in inputs]
        for future in futures:
            future.result()

    return run


def _one_by_one(bare: Bare, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    def run() -> None:
        for prompt in prompts:
            bare.generate([prompt], tokens)

    return run


def _many_requests(setting: Setting) -> Figure:
    sampler = setting.service.create_sampling_client(base_model=setting.model).result()
    prompt, params = types.ModelInput.from_ints(texts([8])[0]), types.SamplingParams(max_tokens=1, stop=[])
    count = 200 if setting.quick else 1000

    def run() -> None:
        for future in [sampler.sample(prompt, num_samples=1, sampling_params=params) for _ in range(count)]:
            future.result()

    run()  # all buffers have their final size then
    before = setting.engine_mib()
    took_s, after = seconds(run), setting.engine_mib()
    grown = "" if before is None or after is None else f"the engine grew by {after - before:.0f} MiB"
    name = f"{count} requests at once, one token each, all answered"
    return Figure("sampling", name, took_s, None, "s", goal="no error, memory flat", note=grown)
