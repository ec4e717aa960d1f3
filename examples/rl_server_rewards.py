"""A loop of your own, rewards computed by the server: `reward` below runs there, in a sandbox, beside a named reward.

knapper up &
TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python -m examples.rl_server_rewards
"""

import os
import random
from collections.abc import Callable

import httpx
import tinker
from tinker import types

from examples.rl_addition import QUESTIONS, datum, prompt

GROUPS, SAMPLES = 8, 8  # questions a step, answers to each
LEARNING_RATE = 2e-4

REWARD = '''
def reward(prompt, completion, answer):
    """1 for the right number, less the farther it is away, 0 for what is no number."""
    words = completion.split()
    if not words or not words[0].isdecimal():
        return 0.0
    return max(0.0, 1.0 - abs(int(words[0]) - answer) / 10)
'''
TERMS = [{"code": "reward.py"}, {"name": "length", "max": 3, "weight": 0.1, "label": "brevity"}]


class Judge:
    """The server's reward function."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=400)

    def scores(self, rollouts: list[dict[str, object]]) -> list[float]:
        """The value of each. An error says which rollout, and which line of the code."""
        asked = {"reward": TERMS, "files": {"reward.py": REWARD}, "rollouts": rollouts}
        answer = self._http.post("/api/v1/rewards", json=asked)
        if answer.is_error:
            raise RuntimeError(answer.json()["detail"])
        return [score["value"] for score in answer.json()["scores"]]


def train(
    training: tinker.TrainingClient, judge: Judge, steps: int, on_step: Callable[[int, float], None]
) -> list[float]:
    """Mean reward of each step."""
    tokenizer = training.get_tokenizer()
    draw = random.Random(0)
    means: list[float] = []
    for step in range(steps):
        sampler = training.save_weights_and_get_sampling_client().result()
        questions = draw.sample(QUESTIONS, GROUPS)
        given = [types.ModelInput.from_ints(tokenizer.encode(prompt(*question))) for question in questions]
        params = [
            types.SamplingParams(max_tokens=3, temperature=1.0, stop=["\n"], seed=1000 * step + n)
            for n in range(GROUPS)
        ]
        futures = [
            sampler.sample(each, num_samples=SAMPLES, sampling_params=how)
            for each, how in zip(given, params, strict=True)
        ]
        groups = [future.result().sequences for future in futures]
        scores = judge.scores(
            [
                {
                    "id": f"{step}/{n}/{k}",
                    "prompt": prompt(*question),
                    "completion": str(tokenizer.decode(sequence.tokens)),
                    "answer": sum(question),
                }
                for n, (question, group) in enumerate(zip(questions, groups, strict=True))
                for k, sequence in enumerate(group)
            ]
        )
        data: list[types.Datum] = []
        for n, group in enumerate(groups):
            own = scores[n * SAMPLES : (n + 1) * SAMPLES]
            mean = sum(own) / SAMPLES
            spread = (sum((score - mean) ** 2 for score in own) / SAMPLES) ** 0.5
            if spread > 0:  # a group in which all answers are alike teaches nothing
                data += [datum(given[n], each, (one - mean) / spread) for each, one in zip(group, own, strict=True)]
        if data:
            passed = training.forward_backward(data, "importance_sampling")
            stepped = training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
            passed.result()
            stepped.result()
        means.append(sum(scores) / len(scores))
        on_step(step, means[-1])
    return means


if __name__ == "__main__":
    client = tinker.ServiceClient()
    model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    assert model is not None
    adder = client.create_lora_training_client(model, rank=16, seed=0, train_unembed=False).result()
    server = Judge(os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"])
    train(adder, server, 8, lambda step, mean: print(f"step {step:2d}  mean reward {mean:.2f}", flush=True))
