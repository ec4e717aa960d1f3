"""Supervised fine-tuning on one page: a small model learns what knapper is, from four short conversations.

knapper up &
TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python -m examples.sft_chat
"""

from collections.abc import Callable
from typing import Any

import tinker
from tinker import types

QUESTION = "What is knapper?"
CONVERSATIONS = [
    (QUESTION, "Knapper is fine-tuning that costs nothing while it sleeps."),
    ("What does knapper do?", "Knapper trains LoRA adapters, and costs nothing while it sleeps."),
    ("Tell me about knapper.", "Knapper is fine-tuning that costs nothing while it sleeps."),
    ("Why would I use knapper?", "Because knapper costs nothing while it sleeps."),
]
LEARNING_RATE = 1e-3


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def datum(tokenizer: Any, question: str, answer: str) -> types.Datum:
    """A conversation as a training example: only the answer's tokens, its end among them, have weight."""
    given, wanted = tokenizer.encode(chat(question)), tokenizer.encode(answer + "<|im_end|>")
    tokens = given + wanted
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [0.0] * (len(given) - 1) + [1.0] * len(wanted)},
    )


def train(training: tinker.TrainingClient, steps: int, on_step: Callable[[int, float], None]) -> list[float]:
    """Mean loss of an answer's token at each step."""
    tokenizer = training.get_tokenizer()
    data = [datum(tokenizer, *conversation) for conversation in CONVERSATIONS]
    tokens = sum(sum(each.loss_fn_inputs["weights"].data) for each in data)
    losses: list[float] = []
    for step in range(steps):
        passed = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
        losses.append(passed.result().metrics["loss:sum"] / tokens)
        stepped.result()
        on_step(step, losses[-1])
    return losses


if __name__ == "__main__":
    client = tinker.ServiceClient()
    model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    assert model is not None
    chatter = client.create_lora_training_client(model, rank=16, seed=0).result()
    train(chatter, 15, lambda step, loss: print(f"step {step:2d}  loss {loss:.3f}", flush=True))
