"""What the gate asks of each phase, and its answers in words: none if the phase is as it must be."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from knapper.engine import hardware, memory
from knapper.engine.memory import Account, ModelBytes
from knapper.engine.models.preflight import expect_device
from knapper.settings import Settings
from knapper.text.sizes import sized
from tests.engine.gate.meter import Counts
from tests.engine.gate.phases import Bench, prompt

FLOORS: Final[Mapping[str, Mapping[str, Mapping[str, float]]]] = json.loads(
    (Path(__file__).parent / "floors.json").read_text()
)
ROWS: Final = 8192
RAGGED: Final = [[900, 700, 512, 40], [1000, 12, 333], [256, 257, 258, 600], [2048, 5, 100]]


def _decoded(bench: Bench) -> Counts:
    """8 texts of three adapters and the base model, in pools of five capacities."""
    names = ["", "adapter-1", "adapter-2", "adapter-3"]
    for name in names[1:]:
        bench.lora(name)
    texts = [(prompt(40 + 37 * n, n), names[n % 4]) for n in range(8)]  # of 40 to 299 tokens
    _, steps = bench.sample(texts, 1 << 17, max_tokens=3, top_p=0.9)
    return max(steps, key=lambda counts: counts.launches)


def _prefilled(bench: Bench, length: int = 512) -> Counts:
    bench.lora("adapter-1")
    (counts,), _ = bench.sample([(prompt(length), "adapter-1")], 1 << 17, max_tokens=1)
    return counts


def continued(bench: Bench, cached: int = 1024, length: int = 9216) -> Counts:
    """A long prompt that goes on from one that is cached."""
    bench.lora("adapter-1")
    whole = prompt(length)
    (_, counts), _ = bench.sample(
        [(whole[:cached], "adapter-1"), (whole, "adapter-1")], 1 << 17, max_tokens=1
    )  # fmt: skip
    return counts


PHASES: Final[Mapping[str, Callable[[Bench], Counts]]] = {
    "train, a text of 8,192": lambda bench: bench.train([[ROWS]], ROWS),
    "train, 15 texts of 4 runs": lambda bench: bench.train(RAGGED, ROWS),
    "optimizer step": lambda bench: bench.optimize(),
    "prefill of 512": _prefilled,
    "prefill of 8,192 after 1,024": continued,
    "decode, 8 texts": _decoded,
}


def counted(bench: Bench, phase: str) -> Counts:
    """The counts of a phase that nothing of an earlier one is held beside."""
    bench.forget()
    return PHASES[phase](bench)


def complaints(model: str, phase: str, counts: Counts) -> list[str]:
    """Whatever of the phase is above its floor; mixed devices and pageable copies have none."""
    floor = FLOORS[model][phase]
    found = [f"mixed devices: {line} ({times} times)" for line, times in counts.mixed.items()]
    found += [f"a pageable copy: {line} ({times} times)" for line, times in counts.pageable.items()]
    if counts.waits.total() > floor["waits"]:
        found.append(f"{counts.waits.total()} waits for the device; allowed: {floor['waits']}: {dict(counts.waits)}")
    if counts.launches > floor["kernels"]:
        found.append(f"{counts.launches} kernels; allowed: {floor['kernels']}; most: {counts.kernels.most_common(4)}")
    wide = counts.float32_flops.total() / max(1, counts.flops)
    if wide > floor["float32"]:
        lines = counts.float32_flops.most_common(2)
        found.append(f"{wide:.1%} of the products are float32; allowed: {floor['float32']:.1%}; most: {lines}")
    if counts.peak > floor["peak_gib"] * 2**30:
        found.append(f"{counts.peak / 2**30:.2f} GiB held; allowed: {floor['peak_gib']} GiB")
    return found


def account(bench: Bench, card: int) -> Account:
    """As an engine that has the card to itself makes it, with the bytes that the meter holds for the weights."""
    model = ModelBytes.of(bench.decoder, bench.decoder.weights_bytes)
    return memory.divide(memory.planned_left(card, 1.0, model.weights), model, 0, is_cpu=False)


def over_budget(bench: Bench, card: int, of_card: Account) -> list[str]:
    """A whole micro-batch of one run on the card, within what the account gives to weights, a run and passes."""
    assert of_card.passes is not None
    bench.decoder.passes = of_card.passes
    bench.forget()
    others = bench.meter.held - bench.decoder.weights_bytes
    counts = bench.train([[of_card.rows_max]], of_card.rows_max)
    aside = of_card.kv + of_card.adapters + of_card.fragments + memory.CUDA_BYTES
    budget = min(of_card.weights + of_card.activations + of_card.runs, card - aside)
    peak = counts.peak - others
    if peak <= budget:
        return []
    return [f"a pass of {of_card.rows_max} rows holds {sized(peak)}; the card has {sized(budget)} for it"]


def started(settings: Settings) -> list[str]:
    """The first that an engine asks of a GPU, through torch's own Python."""
    try:
        device = expect_device(settings)
        hardware.memory_left(device)
        hardware.dtype_for(settings.dtype, device)
        hardware.release(device)
    except Exception as error:  # noqa: BLE001  whatever it is, the engine does not start
        return [f"the engine does not start: {type(error).__name__}: {error}"]
    return [] if device == torch.device("cuda", 0) else [f"the engine computes on {device}"]
