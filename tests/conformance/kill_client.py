"""What a researcher would run: one loop, no except in it. Prints a line a step, then the hash of what was trained."""

import asyncio
import hashlib
import sys

import tinker
from tinker import types

from knapper.ids import LOCAL_TENANT, TinkerPath
from knapper.settings import Settings
from knapper.state.checkpoints import Checkpoints
from knapper.state.journal import bundles
from knapper.store.factory import open_store


def tokens(seed: int, length: int = 12) -> list[int]:
    return [(seed * 7919 + n * 104729) % 199 for n in range(length)]


def datum(seed: int) -> types.Datum:
    row = tokens(seed, 13)
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * 12},
    )


def main(url: str, model: str, store: str, steps: int) -> None:
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    training = service.create_lora_training_client(model, rank=4, seed=1).result()
    print(f"run {training.model_id}", flush=True)
    answered = hashlib.sha256()
    for step in range(steps):
        passes = [training.forward_backward([datum(100 * step + n)], "cross_entropy") for n in range(2)]
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-3 * (1 + step % 3)))
        for each in passes:
            answered.update(f"{each.result().metrics['loss:sum']!r}\n".encode())
        stepped.result()
        if step % 4 == 1:
            training.save_state(f"step-{step}").result()
        if step % 3 == 2:
            sampler = training.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=6, seed=step, stop=[])
            sampled = sampler.sample(types.ModelInput.from_ints(tokens(step)), num_samples=2, sampling_params=params)
            for sequence in sampled.result().sequences:
                answered.update(f"{sequence.tokens!r} {sequence.logprobs!r}\n".encode())
        print(f"step {step}", flush=True)
    path = training.save_state("final").result().path
    service.close("success").result()
    trained = asyncio.run(digest_of(store, path))
    print(f"trained {trained} answered {answered.hexdigest()}", flush=True)


async def digest_of(address: str, path: str) -> str:
    """SHA-256 of a checkpoint's files, as the store has them: weights, moments and step count."""
    where = "KNAPPER_STORE" if address.startswith("gs://") else "KNAPPER_DATA"
    store = open_store(Settings.load({where: address}))
    checkpoint = await Checkpoints(store, lambda: 0.0).resolve(TinkerPath.parse(path), LOCAL_TENANT)
    _, files = await bundles.read(store, checkpoint.bundle)
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        if name.endswith(".safetensors"):
            whole.update(name.encode() + content)
    return whole.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
