"""Operations through the SDK and `knapper up`, beside the same work called in this process.

On a tiny random model, one thread each.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tinker
import torch
from tinker import types

from benchmarks.figures import Figure, Timed, paired, seconds
from knapper.engine.executor import Executor, Work
from knapper.engine.layers.lora import Lora
from knapper.engine.models import weights
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.trainer import Trainer
from knapper.state.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward, SampleRequest, SamplingParams
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

REPEATS, WARM_UP = 60, 5
TOKENS = [(7 * n) % 199 for n in range(13)]
GOALS = {"optim_step": ("<= 15 ms", "8 ms")}


class NoAdapters:
    async def load(self, adapter: str) -> Lora:
        raise AssertionError(f"the bare sampler draws from the base model, not from {adapter}")


def served(service: tinker.ServiceClient, model: Path) -> dict[str, Timed]:
    training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * 12},
    )
    prompt, params = types.ModelInput.from_ints(TOKENS), types.SamplingParams(max_tokens=1, seed=0)
    return {
        "forward_backward": lambda: training.forward_backward([datum], "cross_entropy").result(),
        "optim_step": lambda: training.optim_step(types.AdamParams()).result(),
        "sample one token": lambda: sampler.sample(prompt, num_samples=1, sampling_params=params).result(),
    }


def bare(model: Path, device: Executor, loop: asyncio.AbstractEventLoop) -> dict[str, Timed]:
    config = ModelConfig.read(model)
    decoder = Decoder(config, weights.load(model, config))
    trainer = Trainer(decoder)
    spec = Spec(
        run="bare", tenant="local", base_model=str(model), rank=4, alpha=32.0, seed=1,
        train_attn=True, train_mlp=True, train_unembed=True,
    )  # fmt: skip
    state = trainer.create(spec)
    inputs: dict[str, np.ndarray] = {
        "target_tokens": np.array(TOKENS[1:], np.int64),
        "weights": np.ones(12, np.float32),
    }
    datum = Datum(np.array(TOKENS[:-1], np.int32), inputs)
    request = ForwardBackward("bare", 1, [datum], "cross_entropy", {}, False)
    sampler = EngineSampler(decoder, device, NoAdapters(), None, slots_max=8, kv_tokens_max=4096, now=time.monotonic)
    sample = SampleRequest(str(model), "", np.array(TOKENS, np.int32), SamplingParams(max_tokens=1), seed=0)

    def run(task: Work[object]) -> object:
        return device.submit(task).result()

    return {
        "forward_backward": lambda: run(trainer.forward_backward(state, request)),
        "optim_step": lambda: run(trainer.optim_step(state, AdamW())),
        "sample one token": lambda: loop.run_until_complete(sampler.sample(sample)),
    }


def measure(repeats: int = REPEATS) -> list[Figure]:
    """One thread each: measures the overhead, not the matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device, loop = Executor("bench"), asyncio.new_event_loop()
    figures: list[Figure] = []
    try:
        with tempfile.TemporaryDirectory(prefix="knapper-bench-") as scratch:
            model = tiny_model(Path(scratch) / "models" / "tiny")
            with Server.start(model, Path(scratch) / "data", dtype="float32") as server:
                service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
                ours, theirs = served(service, model), bare(model, device, loop)
                for name, call in ours.items():
                    pair = paired(call, theirs[name], repeats, WARM_UP)
                    with_us, without = 1000 * pair.ours_s, 1000 * pair.bare_s
                    aims, added = GOALS.get(name, ("", "")), with_us - without
                    figures += [
                        Figure("operations", f"{name}, durable, p50", with_us, without, "ms", None, *aims),
                        Figure("operations", f"{name}: added by the way", added, None, "ms", None, "<= 5 ms", "2 ms"),
                    ]
                figures.append(_first_token(service, model, repeats))
                service.close("success").result()
    finally:
        device.close()
        loop.close()
        torch.set_num_threads(threads)
    return figures


def _first_token(service: tinker.ServiceClient, model: Path, repeats: int) -> Figure:
    """From the call of save_weights_and_get_sampling_client to the first token of its sampler."""
    client = service.create_lora_training_client(str(model), rank=4, seed=1).result()
    prompt, params = types.ModelInput.from_ints(TOKENS), types.SamplingParams(max_tokens=1, seed=0)

    def once() -> None:
        client.save_weights_and_get_sampling_client().result().sample(prompt, 1, params).result()

    once()
    median_ms = statistics.median(1000 * seconds(once) for _ in range(repeats))
    return Figure(
        "operations",
        "save_weights_and_get_sampling_client to first token",
        median_ms,
        None,
        "ms",
        None,
        "<= 60 ms",
        "30 ms",
    )
