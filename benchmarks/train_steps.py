"""Steps through the whole server, against the bare loop in this process."""

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import tinker
import torch
from tinker import types

from benchmarks.bare import Bare
from benchmarks.figures import Figure, faster, paired
from benchmarks.served import Setting, datum, step

VOCABULARY = 40_000
UNEVEN = [20, 400, 55, 210, 90, 320, 35, 140]


def texts(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, length).tolist() for length in lengths]


def measure(setting: Setting) -> Iterator[Figure]:
    rows = 4 if setting.quick else 16
    yield _step(setting, f"step, {rows} texts of 128 tokens", texts([128] * rows), (">= 1.8x (with bf16)", "2.7x"))
    uneven = UNEVEN[:3] if setting.quick else UNEVEN
    name = f"step, {len(uneven)} texts of 20 to 400 tokens"
    yield _step(setting, name, texts(uneven), (">= 2.5x (with bf16)", "4x"))
    if not setting.quick and torch.cpu.get_capabilities().get("avx512_bf16"):
        even = texts([128] * rows)
        yield (_step(setting, f"step, {rows} texts of 128, against bf16", even, (">= 1.2x", "1.75x"), torch.bfloat16))
    yield from _tenants(setting, 4 if setting.quick else 8)


def _step(
    setting: Setting, name: str, data: list[list[int]], aims: tuple[str, str], dtype: torch.dtype = torch.float32
) -> Figure:
    client, bare = setting.training_client(), Bare(setting.directory, dtype=dtype)
    weights = [[1.0] * len(text) for text in data]
    datums = [datum(text, weights_of_text) for text, weights_of_text in zip(data, weights, strict=True)]
    pair = paired(lambda: step(client, datums), lambda: bare.step(data, weights), setting.repeats(3))
    return faster("training", name, pair, *aims)


def _tenants(setting: Setting, runs: int, tokens: int = 32) -> Iterator[Figure]:
    """Runs at once, each with one small datum a step."""
    clients = [setting.training_client(seed) for seed in range(runs)]
    bare = Bare(setting.directory, adapters=runs)
    data = [texts([tokens], seed)[0] for seed in range(runs)]
    ones = [1.0] * tokens
    datums = [datum(text, ones) for text in data]

    def ours() -> None:
        futures = [
            (
                client.forward_backward([datum_of_run], "cross_entropy"),
                client.optim_step(types.AdamParams(learning_rate=1e-4)),
            )
            for client, datum_of_run in zip(clients, datums, strict=True)
        ]
        for first, second in futures:
            first.result()
            second.result()

    def theirs() -> None:
        for name, text in zip(bare.names, data, strict=True):
            bare.step([text], [ones], name)

    pair = paired(ours, theirs, setting.repeats(5))
    yield faster("training", f"{runs} runs, a step of {tokens} tokens each", pair, ">= 2.5x", "4x")
    if not setting.quick:  # of few steps it would be the order of their start
        spread = _unevenness(clients, datums, 24)
        yield Figure("training", "the same, slowest run : fastest run", spread, None, "", goal="<= 1.05")


def _unevenness(clients: Sequence[tinker.TrainingClient], datums: Sequence[types.Datum], steps: int) -> float:
    """Every run steps as fast as it can until all have made `steps`: the slowest's time over the fastest's.

    By the number of steps, not by a time: of few steps, one more or less would say 1.25 of equal runs.
    """
    took_s: dict[int, float] = {}
    began = time.monotonic()

    def loop(index: int) -> None:
        done = 0
        while len(took_s) < len(clients):
            step(clients[index], [datums[index]])
            done += 1
            if done == steps:
                took_s[index] = time.monotonic() - began

    workers = [threading.Thread(target=loop, args=(index,)) for index in range(len(clients))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(took_s.values()) / min(took_s.values())
