"""A loop of reinforcement learning as tinker-cookbook has it, in a few lines of the SDK."""

from typing import Any

import tinker
from tinker import types

PROMPT = [5, 9, 2]


def rollouts(
    sampler: tinker.SamplingClient, temperature: float = 1.0, advantage: float = 1.0, *, masked: bool = False
) -> list[types.Datum]:
    """Two of one prompt, as tinker-cookbook assembles them. `masked`: as gspo takes them."""
    params = types.SamplingParams(max_tokens=12, temperature=temperature, stop=[])
    drawn = sampler.sample(types.ModelInput.from_ints(PROMPT), 2, params).result().sequences
    return [datum(each, value, masked=masked) for each, value in zip(drawn, (advantage, -advantage), strict=True)]


def datum(
    drawn: types.SampledSequence, advantage: float, *, prompt: list[int] = PROMPT, masked: bool = False
) -> types.Datum:
    whole, zeros = [*prompt, *drawn.tokens], [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": types.TensorData(data=whole[1:], dtype="int64"),
        "logprobs": types.TensorData(data=[*zeros, *(drawn.logprobs or [])], dtype="float32"),
        "advantages": types.TensorData(data=[*zeros, *[advantage] * len(drawn.tokens)], dtype="float32"),
    }
    if masked:
        mask = [*zeros, *[1.0] * len(drawn.tokens)]
        inputs["sequence_ratio_mask"] = types.TensorData(data=mask, dtype="float32")
    return types.Datum(model_input=types.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)


def step(
    client: tinker.TrainingClient, data: list[types.Datum], loss: Any = "importance_sampling", **config: float
) -> dict[str, float]:
    """One step. The metrics of its pass."""
    metrics = client.forward_backward(data, loss, config or None).result().metrics
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return metrics


def clean_steps(client: tinker.TrainingClient, count: int) -> tinker.SamplingClient:
    """The sampler that the last of them trained on: it is stale from then on."""
    sampler = client.save_weights_and_get_sampling_client().result()
    step(client, rollouts(sampler))
    return sampler if count == 1 else clean_steps(client, count - 1)
