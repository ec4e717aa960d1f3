"""What models that fit a laptop cost there: seconds of a training step, tokens a second, and the process's memory.

    python -m benchmarks.small_models [--only NAME ...] [--dtype float32 bfloat16]

Random weights at each model's true sizes, so that nothing is downloaded, and no server: the engine in a process of its
own for each. Written to out/small_models.json; `make bench-page` makes the table of docs/performance.md of it. The
memory that knapper.catalogue.small_models states is what this found.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import figures
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.loader import load
from knapper.engine.models.prefill import PrefillPrompt
from knapper.engine.models.weight_files import promised
from knapper.engine.training.trainer import Trainer
from knapper.state.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward
from tests.engine.runs import done

STORED: Final = Path("out/small_models.json")
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXTS, TOKENS, DRAWN, RANK = 4, 128, 16, 16
RUN: Final = "ses-00000000000000000000000000000000:train:0"
_LLAMA: Final = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
_QWEN: Final = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "head_dim": 128,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
}  # fmt: skip
_GEMMA: Final = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262_144, "head_dim": 256,
    "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "sliding_window": 512,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "max_position_embeddings": 32_768,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def _sizes(hidden: int, inner: int, layers: int = 0, heads: int = 0, kv_heads: int = 0) -> dict[str, int]:
    named = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip
    return {name: value for name, value in named.items() if value}


# The config.json of each, as far as it decides what is computed.
CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {**_LLAMA, **_sizes(576, 1536, 30, 9, 3), "vocab_size": 49_152},
    "HuggingFaceTB/SmolLM2-360M-Instruct": {**_LLAMA, **_sizes(960, 2560, 32, 15, 5), "vocab_size": 49_152},
    "Qwen/Qwen3-0.6B": {**_QWEN, **_sizes(1024, 3072)},
    "google/gemma-3-1b-it": {**_GEMMA, **_sizes(1152, 6912, 26)},
    "meta-llama/Llama-3.2-1B-Instruct": {**_LLAMA, **_sizes(2048, 8192, 16, 32, 8), "vocab_size": 128_256},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {**_LLAMA, **_sizes(2048, 8192, 24, 32, 32), "vocab_size": 49_152},
    "Qwen/Qwen3-1.7B": {**_QWEN, **_sizes(2048, 6144)},
}


@dataclass(frozen=True)
class Cost:
    """`step_s`: forward, backward and optimizer step of TEXTS x TOKENS tokens. `tokens_per_s`: of as many texts that
    decode at once. `weights`: how many numbers. `peak`: bytes of the whole process.
    """

    weights: int
    load_s: float
    step_s: float
    tokens_per_s: float
    peak: int


def write_model(directory: Path, name: str) -> ModelConfig:
    """Random weights in bfloat16, one file a model."""
    common = {"tie_word_embeddings": True, "max_position_embeddings": 8192, "eos_token_id": 0, "rope_theta": 1e5}
    (directory / "config.json").write_text(json.dumps({**common, **CONFIGS[name]}))
    config = ModelConfig.read(directory)
    draw = torch.Generator().manual_seed(0)
    weights = {tensor: torch.randn(shape, generator=draw).mul_(0.02).bfloat16() for tensor, shape in promised(config)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return config


def cost(directory: Path, dtype: torch.dtype) -> Cost:
    """On as many threads as there are cores; each figure of the second time."""
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    model = load(directory, dtype)
    load_s = time.perf_counter() - began
    config = model.config
    assert isinstance(config, ModelConfig)
    trainer = Trainer(model)
    spec = Spec(
        run=RUN, tenant="local", base_model="m", rank=RANK, alpha=32.0, seed=0,
        train_attn=True, train_mlp=True, train_unembed=False,
    )  # fmt: skip
    state, rng = trainer.create(spec), np.random.default_rng(0)
    texts = [rng.integers(1, config.vocab_size, TOKENS + 1).astype(np.int32) for _ in range(TEXTS)]
    data = [
        Datum(text[:-1], {"target_tokens": text[1:].astype(np.int64), "weights": np.ones(TOKENS, np.float32)})
        for text in texts
    ]
    step_s = 0.0
    for _ in range(2):
        began = time.perf_counter()
        state, _ = done(trainer.forward_backward(state, ForwardBackward(RUN, 1, data, "cross_entropy", {}, False)))
        state, _ = done(trainer.optim_step(state, AdamW()))
        step_s = time.perf_counter() - began
    lora, decoding = state.lora(), model.decode_state(TEXTS * 2 * TOKENS)
    for prefilled in model.prefill([PrefillPrompt(text[:-1], lora) for text in texts]):
        decoding.add(prefilled.past, TOKENS)
    began = 0.0
    for number in range(DRAWN + 1):
        began = time.perf_counter() if number == 1 else began
        decoding.reserve()
        decoding.step(torch.full((TEXTS,), number + 1), [lora] * TEXTS)
    numbers = sum(math.prod(shape) for _, shape in promised(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(numbers, load_s, step_s, TEXTS * DRAWN / (time.perf_counter() - began), peak)


def measured(name: str, dtype: str) -> Cost:
    """In a process of its own, which loads the model and nothing else."""
    with TemporaryDirectory() as directory:
        write_model(Path(directory), name)
        command = [sys.executable, "-m", "benchmarks.small_models", "--one", directory, "--dtype", dtype]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return Cost(**json.loads(finished.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_models", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(cost(options.one, DTYPES[options.dtype[0]]))))
        return
    began, machine, rows = time.monotonic(), figures.machine(), []
    for name in options.only:
        for dtype in options.dtype:
            rows.append({"name": name, "dtype": dtype, **asdict(measured(name, dtype))})
            print(json.dumps(rows[-1]), flush=True)
    load = os.getloadavg()[0]
    figures.write(STORED, machine=machine, load_1min_after=load, took_s=round(time.monotonic() - began), rows=rows)


if __name__ == "__main__":
    main()
