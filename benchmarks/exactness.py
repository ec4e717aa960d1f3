"""`make exactness`: are the promised bits kept on this CPU, under every instruction set that it has, at what cost?

    python -m benchmarks.exactness [--quick] [--model DIRECTORY_OR_NAME] [--threads 1 2] [--dtypes float32]
        [--instructions AVX2 AVX-512]

The engine on a real model, base and adapters of several ranks. The largest difference in a log-probability, of the same
text and weights, between

- the sampler and the trainer,
- the trainer, the text alone, and the same among others: of its own request, and of other runs in the pass,
- the sampler, the text alone, and the same in a crowd,
- a run after three steps by itself, and the same run beside three others.

Each is 0 where nothing is lost. Instruction sets are those that the libraries can be told to use: each in a process of
its own, because they read that once. Speed: a training step and a decoding step, with the bits kept, and beside it with
them given up (`KNAPPER_BATCH_INVARIANT=false`). Written to out/exactness.json.
"""

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import torch

from benchmarks import figures
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.engine.executor import Executor, Work
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.lora import Lora
from knapper.engine.models.base import Model
from knapper.engine.models.loader import load
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.batch import compute
from knapper.engine.training.trainer import RunState, Trainer
from knapper.settings import Settings
from knapper.state.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward, SampleOutput, SampleRequest, SamplingParams

T = TypeVar("T")

HOLDING: Final = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
STORED: Final = Path("out/exactness.json")
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASE: Final = ""
ADAPTERS: Final[dict[str, dict[str, Any]]] = {
    "rank 32, head too": {"rank": 32, "train_unembed": True},
    "rank 8": {"rank": 8},
    "rank 40, attention": {"rank": 40, "train_mlp": False},
}
LENGTHS: Final = (1, 9, 40, 77, 130, 230)
LENGTHS_QUICK: Final = (1, 70)


@dataclass(frozen=True)
class InstructionSet:
    """The environment variables that choose an instruction set; each library reads them once."""

    name: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """Largest differences in a log-probability: of the base model, and of adapters; infinite where other tokens were
    drawn. Seconds of a step: with the bits kept, and with them given up.
    """

    instructions: str
    dtype: str
    threads: int
    sampler_trainer: tuple[float, float]
    trainer_alone: tuple[float, float]
    sampler_alone: tuple[float, float]
    run_alone: float
    train_s: tuple[float, float]
    decode_s: tuple[float, float]
    found: Mapping[str, str]
    broken: Sequence[str]

    @classmethod
    def read(cls, line: str) -> "Row":
        return msgspec.convert(json.loads(line), cls)  # the standard library reads infinity, msgspec does not

    @property
    def zero(self) -> bool:
        return not any((*self.sampler_trainer, *self.trainer_alone, *self.sampler_alone, self.run_alone))


def _loaded(directory: Path, dtype: torch.dtype, threads: int, exactness: Exactness) -> Work[Model]:
    yield from ()
    torch.set_num_threads(threads)
    return load(directory, dtype, torch.device("cpu"), exactness)


class _Adapters:
    def __init__(self, loras: Mapping[str, Lora]) -> None:
        self._loras = loras

    async def load(self, adapter: str) -> Lora:
        return self._loras[adapter]


class Subject:
    """A trainer and a sampler on one model, in one dtype, with adapters that have an effect."""

    def __init__(
        self, directory: Path, dtype: torch.dtype, threads: int, lengths: Sequence[int], adapters: int, *, exact: bool
    ) -> None:
        self.device = Executor()
        self.exactness = Exactness(promised=exact)
        model = self.done(_loaded(directory, dtype, threads, self.exactness))
        self.trainer = Trainer(model)
        self.vocabulary = min(model.config.vocab_size, 40_000)
        self.lengths = lengths
        self.states = {
            name: self._grown(number, values)
            for number, (name, values) in enumerate([(BASE, {"rank": 8}), *list(ADAPTERS.items())[:adapters]])
        }
        loras = {name: state.lora() for name, state in self.states.items() if name != BASE}
        self.sampler = EngineSampler(
            model, self.device, _Adapters(loras), None, slots_max=64, kv_tokens_max=1 << 15, now=time.monotonic
        )

    def done(self, task: Work[T]) -> T:
        """On the device's thread, where everything computes."""
        return self.device.submit(task).result()

    def _grown(self, number: int, values: Mapping[str, Any]) -> RunState:
        """A new adapter, with a B that has an effect, except for the base's."""
        spec = Spec(
            run=f"run-{number}", tenant="local", base_model="m", alpha=32.0, seed=number, train_attn=True,
            **{"train_mlp": True, "train_unembed": False, **values},
        )  # fmt: skip
        state = self.trainer.create(spec)
        if number:
            generator = torch.Generator().manual_seed(number)
            for _, _, b in state.layout.matrices(state.weights_P):
                b.normal_(0, 0.003, generator=generator)
        return state

    def texts(self, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(1, self.vocabulary, length).astype(np.int32) for length in self.lengths]

    def sampled(self, requests: Sequence[SampleRequest]) -> list[SampleOutput]:
        async def together() -> list[SampleOutput]:
            return list(await asyncio.gather(*(self.sampler.sample(request) for request in requests)))

        return asyncio.run(together())

    def scored(self, state: RunState, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The trainer's log-probabilities of each text's tokens after the first, all in one request."""
        _, output = self.done(self.trainer.forward_backward(state, request(texts)))
        return [datum_output["logprobs"] for datum_output in output.outputs]

    def step(self, states: Sequence[RunState], requests: Sequence[ForwardBackward]) -> list[RunState]:
        """One step of each run, all of them in the same passes."""
        pending = [self.trainer.open(state, request) for state, request in zip(states, requests, strict=True)]
        while unfinished := [entry for entry in pending if not entry.done]:
            self.done(compute(self.trainer.decoder, unfinished))
        stepped = [self.trainer.close(state, request)[0] for state, request in zip(states, pending, strict=True)]
        return [self.done(self.trainer.optim_step(state, AdamW(learning_rate=1e-3)))[0] for state in stepped]


def request(texts: Sequence[np.ndarray]) -> ForwardBackward:
    data = [
        Datum(text[:-1].astype(np.int32), {"target_tokens": text[1:].astype(np.int64),
                                           "weights": np.ones(len(text) - 1, np.float32)})
        for text in texts
    ]  # fmt: skip
    return ForwardBackward("run", 1, data, "cross_entropy", {}, forward_only=False)


def furthest(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """The largest difference; infinite if the sampled tokens differ."""
    return max(
        float(np.abs(a.astype(np.float64) - b).max(initial=0)) if a.shape == b.shape else float("inf")
        for a, b in zip(first, second, strict=True)
    )


def sample(adapter: str, prompt: np.ndarray, seed: int, tokens: int) -> SampleRequest:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return SampleRequest("m", adapter, prompt, params, seed=seed, num_samples=1, prompt_logprobs=len(prompt) > 1)


def sampler_gaps(subject: Subject, tokens: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(sampler against trainer, alone against in a batch), each of the base and of the adapters."""
    requests = [
        sample(name, prompt, seed, tokens) for name in subject.states for seed, prompt in enumerate(subject.texts(1))
    ]
    crowded = subject.sampled(requests)
    against_trainer, against_alone = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
    for sample_request, output in zip(requests, crowded, strict=True):
        (alone,) = subject.sampled([sample_request])
        crowded_logprobs, alone_logprobs = (
            np.concatenate([_prompt(of), of.sequences[0].logprobs]) for of in (output, alone)
        )
        same = np.array_equal(output.sequences[0].tokens, alone.sequences[0].tokens)
        adapted = sample_request.adapter != BASE
        against_alone[adapted] = max(
            against_alone[adapted], furthest([crowded_logprobs], [alone_logprobs if same else alone_logprobs[:0]])
        )
        text = np.concatenate([sample_request.prompt, output.sequences[0].tokens])
        against_trainer[adapted] = max(
            against_trainer[adapted],
            furthest([crowded_logprobs], subject.scored(subject.states[sample_request.adapter], [text])),
        )
    return tuple(against_trainer.values()), tuple(against_alone.values())  # type: ignore[return-value]  # two each


def _prompt(output: SampleOutput) -> np.ndarray:
    """Log-probabilities of the prompt's tokens after the first."""
    return np.zeros(0, np.float32) if output.prompt_logprobs is None else output.prompt_logprobs[1:]


def trainer_gaps(subject: Subject) -> tuple[float, float]:
    """A text alone against the same among those of its request, and among those of other runs."""
    texts = [text for text in subject.texts(2) if len(text) > 1]
    gaps = {False: 0.0, True: 0.0}
    pending = [subject.trainer.open(state, request(texts)) for state in subject.states.values()]
    while unfinished := [entry for entry in pending if not entry.done]:
        subject.done(compute(subject.trainer.decoder, unfinished))
    for (name, state), shared in zip(subject.states.items(), pending, strict=True):
        alone = [subject.scored(state, [text])[0] for text in texts]
        together = subject.scored(state, texts)
        crowded = [datum_output["logprobs"] for datum_output in shared.outputs]
        adapted = name != BASE
        gaps[adapted] = max(gaps[adapted], furthest(alone, together), furthest(alone, crowded))
    return gaps[False], gaps[True]


def run_gap(subject: Subject, count: int = 3) -> float:
    """A run's log-probabilities after some steps: alone, and beside the others."""
    texts = [[text for text in subject.texts(10 + number) if len(text) > 1] for number in range(len(subject.states))]
    states = list(subject.states.values())[1:]
    beside, alone = states, states[:1]
    for number in range(count):
        requests = [request(texts[(number + index) % len(texts)]) for index in range(len(states))]
        beside = subject.step(beside, requests)
        alone = subject.step(alone, requests[:1])
    return furthest(subject.scored(alone[0], texts[0]), subject.scored(beside[0], texts[0]))


def speed(subject: Subject, repeats: int) -> tuple[float, float]:
    """Seconds of a training step of 4 texts of 128 tokens, and of a decoding step of 8 texts with an adapter."""
    rng = np.random.default_rng(3)
    state = subject.states["rank 8"]
    texts = [rng.integers(1, subject.vocabulary, 129).astype(np.int32) for _ in range(4)]
    train_s = min(figures.seconds(lambda: subject.step([state], [request(texts)])) for _ in range(repeats + 1))
    few, many = (
        min(figures.seconds(partial(_decoded, subject, texts, tokens)) for _ in range(repeats)) for tokens in (2, 26)
    )
    return train_s, (many - few) / 24


def _decoded(subject: Subject, texts: Sequence[np.ndarray], tokens: int) -> None:
    subject.sampled([sample("rank 8", text[: 20 + seed], seed, tokens) for seed, text in enumerate([*texts, *texts])])


def measure(instructions: str, directory: Path, dtype: str, threads: int, *, quick: bool) -> Row:
    """In this process, with the instruction sets that its environment allows."""
    lengths, adapters = (LENGTHS_QUICK, 2) if quick else (LENGTHS, len(ADAPTERS))
    subject = Subject(directory, DTYPES[dtype], threads, lengths, adapters, exact=True)
    against_trainer, against_alone = sampler_gaps(subject, 3 if quick else 12)
    alone = trainer_gaps(subject)
    run = run_gap(subject, 1 if quick else 3)
    layouts, broken = subject.exactness.layouts, subject.exactness.broken
    exact_s = inexact_s = (0.0, 0.0)
    if not quick:
        exact_s = speed(subject, 2)
        subject.device.close()
        subject = Subject(directory, DTYPES[dtype], threads, lengths, adapters, exact=False)
        inexact_s = speed(subject, 2)
    subject.device.close()
    return Row(
        instructions=instructions,
        dtype=dtype,
        threads=threads,
        sampler_trainer=against_trainer,
        trainer_alone=alone,
        sampler_alone=against_alone,
        run_alone=run,
        train_s=(exact_s[0], inexact_s[0]),
        decode_s=(exact_s[1], inexact_s[1]),
        found=layouts,
        broken=broken,
    )


def instruction_sets() -> list[InstructionSet]:
    """The instruction sets of this CPU that the libraries can be limited to; the last is their own choice."""
    capabilities = torch.cpu.get_capabilities()
    bf16, amx = capabilities.get("avx512_bf16"), capabilities.get("amx_bf16")
    variants = [
        ("AVX2", "AVX2", "avx2", "AVX2", capabilities.get("avx512_f")),
        ("AVX-512", "AVX512_CORE", "avx512", "AVX512", bf16 or amx),
        ("AVX-512 with bf16", "AVX512_CORE_BF16", "avx512", "AVX512", amx),
    ]
    sets = [
        InstructionSet(name, dict(zip(HOLDING, (onednn, aten, mkl), strict=True)))
        for name, onednn, aten, mkl, more in variants
        if more
    ]
    own = "AMX" if amx else "AVX-512 with bf16" if bf16 else "AVX-512" if capabilities.get("avx512_f") else "AVX2"
    return [*sets, InstructionSet(own, {})]


def measured(instruction_set: InstructionSet, model: str, dtype: str, threads: int, *, quick: bool) -> Row:
    """In a process of its own, which reads the environment that limits the libraries."""
    environment = {key: value for key, value in os.environ.items() if key not in HOLDING}
    stdout = subprocess.run(
        [sys.executable, "-m", "benchmarks.exactness", "--child", "--model", model, "--dtypes", dtype,
         "--threads", str(threads), *(["--quick"] if quick else [])],
        env={**environment, **instruction_set.environment}, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    return replace(Row.read(stdout.splitlines()[-1]), instructions=instruction_set.name)


def table(rows: Sequence[Row]) -> str:
    """The table of docs/performance.md."""

    def difference(value: float) -> str:
        return "other tokens" if value == float("inf") else f"{value:.2g}"

    def pair(two: tuple[float, float]) -> str:
        return " / ".join(map(difference, two))

    columns = (
        "instructions, dtype, threads", "sampler against trainer", "trainer, alone, among others",
        "sampler, alone, in a crowd", "run, alone, beside others", "training step, bits given up",
        "decoding step, bits given up",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        train, decode = row.train_s, row.decode_s
        lines.append(
            f"| {row.instructions}, {row.dtype}, {row.threads} | {pair(row.sampler_trainer)} | "
            f"{pair(row.trainer_alone)} | {pair(row.sampler_alone)} | {difference(row.run_alone)} | "
            f"{train[0]:.2f}, {train[1]:.2f} s | {1000 * decode[0]:.0f}, {1000 * decode[1]:.0f} ms |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Are the promised bits kept on this CPU, and what does that cost?")
    parser.add_argument("--model", default=SMOLLM2, help="a directory, or a name")
    parser.add_argument("--threads", type=int, nargs="+", default=[min(2, os.cpu_count() or 1)])
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    here = [each.name for each in instruction_sets()]
    parser.add_argument("--instructions", nargs="+", choices=here, default=here, help="which; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter texts, one step, no speed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    directory = obtain(options.model, Settings.load(os.environ).cache, say=lambda _: None)
    if options.child:
        row = measure("", directory, *options.dtypes, *options.threads, quick=options.quick)
        print(json.dumps(asdict(row)))
        return 0
    rows = []
    chosen = [each for each in instruction_sets() if each.name in options.instructions]
    for instruction_set, dtype, threads in itertools.product(chosen, options.dtypes, dict.fromkeys(options.threads)):
        rows.append(measured(instruction_set, str(directory), dtype, threads, quick=options.quick))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        for product, layout in rows[-1].found.items():
            print(f"    {product}: {layout}")
        for product in rows[-1].broken:
            print(f"    {product}: NO WAY FOUND")
    print(table(rows))
    figures.write(STORED, machine=figures.machine(), rows=[asdict(row) for row in rows])
    lossy = [row for row in rows if not row.zero]
    print(f"{len(lossy)} of {len(rows)} lose bits that are promised" if lossy else "every promised bit is kept")
    return 1 if lossy else 0


if __name__ == "__main__":
    sys.exit(main())
