"""A whole iteration of reinforcement learning, and many loops that wait for slow rewards on one engine."""

import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import matplotlib

matplotlib.use("Agg")
import tinker
from matplotlib import pyplot as plt
from prometheus_client.parser import text_string_to_metric_families
from tinker import types

from benchmarks.bare import Bare
from benchmarks.figures import Figure, faster, paired, seconds
from benchmarks.served import Setting, step
from benchmarks.train_steps import texts

SAMPLES = 8


def measure(setting: Setting) -> Iterator[Figure]:
    yield _iteration(setting, 96)
    if not setting.quick:
        yield _iteration(setting, 256)
    yield from _sharing(setting)


def iterate(client: tinker.TrainingClient, prompts: list[list[int]], tokens: int, wait_s: float = 0.0) -> None:
    """Save, sample a group for each prompt, wait for rewards, train on them."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
    futures = [sampler.sample(types.ModelInput.from_ints(prompt), SAMPLES, params) for prompt in prompts]
    groups = [future.result().sequences for future in futures]
    time.sleep(wait_s)
    data = [
        rollout(prompt, sequence.tokens, sequence.logprobs or [], 1.0 if index % 2 else -1.0)
        for prompt, group in zip(prompts, groups, strict=True)
        for index, sequence in enumerate(group)
    ]
    step(client, data, "importance_sampling")


def rollout(prompt: list[int], tokens: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    before = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints([*prompt, *tokens[:-1]]),
        loss_fn_inputs={
            "target_tokens": [*prompt[1:], *tokens],
            "logprobs": [*[0.0] * before, *logprobs],
            "advantages": [*[0.0] * before, *[advantage] * len(tokens)],
        },
    )


def _iteration(setting: Setting, length: int) -> Figure:
    groups, tokens = (1, 16) if setting.quick else (8, 32)
    prompts = texts([length] * groups)
    client, bare = setting.training_client(), Bare(setting.directory)

    def theirs() -> None:
        repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
        sequences = bare.generate(repeated, tokens).tolist()
        weights = [[0.0] * length + [1.0 if index % 2 else -1.0] * tokens for index in range(len(sequences))]
        bare.step(sequences, weights, at_once=SAMPLES)

    pair = paired(lambda: iterate(client, prompts, tokens), theirs, 1 if length > 96 else setting.repeats(2), 0)
    name = f"GRPO iteration: {groups} prompts of {length} x {SAMPLES} samples of {tokens}"
    return faster("reinforcement", name, pair, ">= 2.5x", "5x", "the bare loop trains on a group at a time")


def _sharing(setting: Setting) -> list[Figure]:
    """Loops that wait two thirds of their time for a reward: the steps of several on one engine."""
    prompts, tokens = texts([48]), 8
    alone = setting.training_client()
    iterate(alone, prompts, tokens)
    wait_s = 2 * statistics.median(seconds(lambda: iterate(alone, prompts, tokens)) for _ in range(setting.repeats(3)))
    counts = (1, 3) if setting.quick else (1, 2, 3, 8)
    together = {jobs: _together(setting, jobs, prompts, tokens, wait_s) for jobs in counts}
    rates = {jobs: measurement.steps_a_minute for jobs, measurement in together.items()}
    _draw(rates, {jobs: measurement.busy for jobs, measurement in together.items()}, Path("out/sharing.png"))
    figures = []
    for jobs in counts:
        name = f"{jobs} loops that wait {wait_s:.1f} s of each step: steps a minute"
        goal, stretch = {3: (">= 2.7x", "2.95x"), 8: ("engine busy >= 95 %", "")}.get(jobs, ("", ""))
        note = f"engine busy {100 * together[jobs].busy:.0f} %" if setting.server else ""
        ratio = rates[jobs] / rates[1]
        figures.append(Figure("reinforcement", name, rates[jobs], rates[1], "/min", ratio, goal, stretch, None, note))
    return figures


@dataclass(frozen=True)
class Together:
    steps_a_minute: float  # of all loops
    busy: float  # the part of the time in which the engine's device computed


def _together(setting: Setting, jobs: int, prompts: list[list[int]], tokens: int, wait_s: float) -> Together:
    """All start at once, the worst case, and run until each has made `steps` counted steps.

    The first steps are not counted: they desynchronise the loops.
    """
    clients = [setting.training_client(seed) for seed in range(jobs)]
    skipped, counted = (1, 2) if setting.quick else (2, 6)
    ends: list[list[float]] = [[] for _ in range(jobs)]
    readings: list[tuple[float, float]] = []  # (time, seconds that the device was busy), at both ends of what counts
    over, lock = threading.Event(), threading.Lock()

    def loop(index: int) -> None:
        try:
            while not over.is_set():
                iterate(clients[index], prompts, tokens, wait_s)
                with lock:
                    ends[index].append(time.monotonic())
                    if min(map(len, ends)) >= (skipped if not readings else skipped + counted) and not over.is_set():
                        readings.append((ends[index][-1], _device_busy_s(setting)))
                        if len(readings) == 2:
                            over.set()
        finally:
            over.set()  # a loop that fails ends the others

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(loop, index) for index in range(jobs)]:
            done.result()
    (began, busy_before), (ended, busy_after) = readings
    each = [[end for end in own if began <= end <= ended] for own in ends]
    rate = sum((len(own) - 1) / (own[-1] - own[0]) for own in each)
    return Together(60 * rate, (busy_after - busy_before) / (ended - began))


def _device_busy_s(setting: Setting) -> float:
    """Device seconds so far; 0 of another server."""
    if setting.server is None:
        return 0.0
    scraped = httpx.get(f"http://127.0.0.1:{setting.server.ports()['engine']}/train_step/metrics", trust_env=False)
    for family in text_string_to_metric_families(scraped.raise_for_status().text):
        if family.name == "knapper_device_busy_seconds":
            return family.samples[0].value
    raise LookupError("the engine does not tell knapper_device_busy_seconds")


def _draw(rates: dict[int, float], busy: dict[int, float], path: Path) -> None:
    figure, left = plt.subplots(figsize=(6, 3.6), layout="constrained")
    left.plot(list(rates), list(rates.values()), marker="o", color="tab:green")
    left.set(xlabel="loops on one engine", ylabel="steps a minute, all together", ylim=(0, None))
    right = left.twinx()
    right.bar(list(busy), [100 * share for share in busy.values()], alpha=0.2, color="tab:blue")
    right.set(ylabel="engine busy, %", ylim=(0, 100))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
