"""What a researcher would run: one loop, no except in it. Prints a line a step, then the hash of what was trained."""

import hashlib
import sys
from pathlib import Path

import tinker
from tinker import types


def tokens(seed: int, length: int = 12) -> list[int]:
    return [(seed * 7919 + n * 104729) % 199 for n in range(length)]


def datum(seed: int) -> types.Datum:
    row = tokens(seed, 13)
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * 12},
    )


def main(url: str, model: str, data: Path, steps: int) -> None:
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
    whole = hashlib.sha256()
    for file in files_of(data, path):
        whole.update(file.name.encode() + file.read_bytes())
    print(f"trained {whole.hexdigest()} answered {answered.hexdigest()}", flush=True)


def files_of(data: Path, path: str) -> list[Path]:
    """The files of a checkpoint, where the directory store keeps them: weights, moments and step count."""
    run = path.removeprefix("tinker://").partition("/")[0]
    newest = max((data / "store" / "adapters" / run).iterdir(), key=lambda each: each.name.partition("-")[0])
    return sorted(file for file in newest.iterdir() if file.suffix == ".safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
