"""`make bench`: what an operation costs through the SDK and `knapper up`, beside the same work called in this process.

Medians of repeats that alternate (served, bare, served, bare, ...), on a tiny random model, so that what is measured is
the road and not the matrices. One figure a line, as a ratio and as milliseconds added. Then the stores, and jobs.
Written to out/bench.json too.
"""

import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tinker
import torch
from tinker import types

from benchmarks import overlap, stores
from knapper.engine import weights
from knapper.engine.config import ModelConfig
from knapper.engine.decoder import Decoder
from knapper.engine.device import Device, Task
from knapper.engine.lora import Lora
from knapper.engine.sampler import Sampler
from knapper.engine.training import Trainer
from knapper.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward, Sample, SamplingParams
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

REPEATS, WARM_UP = 60, 5
TOKENS = [(7 * n) % 199 for n in range(13)]
Timed = Callable[[], object]


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


def bare(model: Path, device: Device, loop: asyncio.AbstractEventLoop) -> dict[str, Timed]:
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
    sampler = Sampler(decoder, device, NoAdapters(), None, slots_max=8, kv_tokens_max=4096)
    sample = Sample(str(model), "", np.array(TOKENS, np.int32), SamplingParams(max_tokens=1), seed=0)

    def run(task: Task[object]) -> object:
        return device.submit(task).result()

    return {
        "forward_backward": lambda: run(trainer.forward_backward(state, request)),
        "optim_step": lambda: run(trainer.optim_step(state, AdamW())),
        "sample one token": lambda: loop.run_until_complete(sampler.sample(sample)),
    }


def milliseconds(call: Timed) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    device, loop = Device("bench"), asyncio.new_event_loop()
    figures = {}
    with tempfile.TemporaryDirectory(prefix="knapper-bench-") as scratch:
        model = tiny_model(Path(scratch) / "models" / "tiny")
        with Server.start(model, Path(scratch) / "data") as server:
            service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
            ours, theirs = served(service, model), bare(model, device, loop)
            print(f"{'p50, milliseconds':22}{'served':>9}{'bare':>9}{'added':>9}{'ratio':>8}")
            for name, call in ours.items():
                pairs = [(milliseconds(call), milliseconds(theirs[name])) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
                with_us, without = (statistics.median(column) for column in zip(*pairs, strict=True))
                figures[name] = {"served_ms": with_us, "bare_ms": without, "ratio": with_us / without}
                added = with_us - without
                print(f"{name:22}{with_us:9.1f}{without:9.1f}{added:9.1f}{with_us / without:8.1f}", flush=True)
            service.close("success").result()
    device.close()
    loop.close()
    store_figures = stores.measured()
    print(f"\n{stores.table(store_figures)}")
    job_figures = overlap.measured()
    print(f"\n{overlap.table(job_figures)}")
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    out = Path("out")
    out.mkdir(exist_ok=True)
    found = {"machine": machine, "repeats": REPEATS, "figures": figures, "stores": store_figures, "jobs": job_figures}
    (out / "bench.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
