"""Reinforcement learning on one page: a small model learns to add. The loop runs here, the compute in knapper.

knapper up &
TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python -m examples.rl_addition
"""

import random
from collections.abc import Callable

import tinker
from tinker import types

QUESTIONS = [(a, b) for a in range(1, 9) for b in range(1, 9) if a + b < 10]
GROUPS, SAMPLES = 8, 8  # questions a step, answers to each
LEARNING_RATE = 2e-4


def prompt(a: int, b: int) -> str:
    return f"Q: What is {a} plus {b}?\nA: "


def reward(answer: str, a: int, b: int) -> float:
    """1 for the right number and nothing else before the line ends, else 0."""
    return float(answer.strip() == str(a + b))


def train(training: tinker.TrainingClient, steps: int, on_step: Callable[[int, float], None]) -> list[float]:
    """Mean reward of each step."""
    tokenizer = training.get_tokenizer()
    params = types.SamplingParams(max_tokens=3, temperature=1.0, stop=["\n"])
    draw = random.Random(0)
    rewards: list[float] = []
    for step in range(steps):
        sampler = training.save_weights_and_get_sampling_client().result()
        questions = draw.sample(QUESTIONS, GROUPS)
        prompts = [types.ModelInput.from_ints(tokenizer.encode(prompt(*question))) for question in questions]
        futures = [
            sampler.sample(
                each, num_samples=SAMPLES, sampling_params=params.model_copy(update={"seed": 1000 * step + n})
            )
            for n, each in enumerate(prompts)
        ]
        data: list[types.Datum] = []
        total = 0.0
        for question, given, future in zip(questions, prompts, futures, strict=True):
            sequences = future.result().sequences
            scores = [reward(str(tokenizer.decode(sequence.tokens)), *question) for sequence in sequences]
            mean = sum(scores) / len(scores)
            spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
            total += mean
            if spread > 0:  # a group in which all answers are alike teaches nothing
                data += [
                    datum(given, sequence, (score - mean) / spread)
                    for sequence, score in zip(sequences, scores, strict=True)
                ]
        if data:
            passed = training.forward_backward(data, "importance_sampling")
            stepped = training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
            passed.result()
            stepped.result()
        rewards.append(total / GROUPS)
        on_step(step, rewards[-1])
    return rewards


def datum(given: types.ModelInput, sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """One answer as a training example: each token predicts the next, and only the sampled ones count."""
    prompt_tokens = given.to_ints()
    tokens = prompt_tokens + list(sequence.tokens)
    before = len(prompt_tokens) - 1
    assert sequence.logprobs is not None
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + list(sequence.logprobs),
            "advantages": [0.0] * before + [advantage] * len(sequence.tokens),
        },
    )


if __name__ == "__main__":
    client = tinker.ServiceClient()
    model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    assert model is not None
    adder = client.create_lora_training_client(model, rank=16, seed=0, train_unembed=False).result()
    train(adder, 30, lambda step, mean: print(f"step {step:2d}  mean reward {mean:.2f}", flush=True))
