"""Supervised fine-tuning: a model learns Pig Latin from examples, and is asked for words that it never saw."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tinker
from tinker import types

from recipes import common

WORDS = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named."""

    model: str = ""
    steps: int = 30
    batch: int = 16
    held_out: int = 40
    rank: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


def pig_latin(word: str) -> str:
    """The rule: consonants before the first vowel go to the end, and `ay` follows; after a vowel, `way`."""
    start = next((n for n, letter in enumerate(word) if letter in "aeiou"), len(word))
    return f"{word[start:]}{word[:start]}ay" if start else f"{word}way"


def spelled(word: str) -> str:
    """With a blank between letters: a tokenizer's own pieces hide them from the model."""
    return " ".join(word)


def prompt(word: str) -> str:
    return f"English: {spelled(word)}\nPig Latin:"


def split(options: Options) -> tuple[list[str], list[str]]:
    """(words to learn from, words to be asked for), which have none in common."""
    words = random.Random(options.seed).sample(WORDS, len(WORDS))
    return words[options.held_out :], words[: options.held_out]


def ask(training: tinker.TrainingClient, words: list[str]) -> list[str]:
    """What the model as it is now says for each word."""
    sampler = training.save_weights_and_get_sampling_client().result()
    said = common.answers(sampler, training.get_tokenizer(), [prompt(word) for word in words], max_tokens=24)
    return [answer.replace(" ", "") for answer in said]


def right(words: list[str], said: list[str]) -> float:
    return sum(pig_latin(word) == answer for word, answer in zip(words, said, strict=True)) / len(words)


def loop(training: tinker.TrainingClient, words: list[str], options: Options) -> list[float]:
    """The loss per token of each step."""
    tokenizer: Any = training.get_tokenizer()
    draw = random.Random(options.seed + 1)
    losses: list[float] = []
    for step in range(options.steps):
        chosen = draw.sample(words, min(options.batch, len(words)))
        data = [common.example(tokenizer, prompt(word), f" {spelled(pig_latin(word))}\n") for word in chosen]
        tokens = sum(sum(each.loss_fn_inputs["weights"].data) for each in data)
        passed = training.forward_backward(data, "cross_entropy")
        rate = options.learning_rate * (1 - step / options.steps)
        stepped = training.optim_step(types.AdamParams(learning_rate=rate))
        losses.append(passed.result().metrics["loss:sum"] / tokens)
        stepped.result()
        if step % 5 == 4:
            print(f"step {step + 1:3}/{options.steps}  loss {losses[-1]:.3f}", flush=True)
    return losses


def run(options: Options) -> tuple[common.Result, list[tuple[str, str, str]]]:
    """The figures, and (word, before, after) of the held-out words."""
    learned, asked = split(options)
    with common.service() as service:
        model = common.model_of(options.model)
        training = service.create_lora_training_client(
            model, rank=options.rank, seed=options.seed, train_unembed=False
        ).result()
        before = ask(training, asked)
        losses = loop(training, learned, options)
        after = ask(training, asked)
    rows: list[list[common.Cell]] = [
        ["held-out words right", right(asked, before), right(asked, after)],
        ["loss per token", losses[0], losses[-1]],
    ]
    figures = common.Table(["", "before", "after"], rows)
    result = common.Result("pig_latin", model, asdict(options), figures, {"loss": losses})
    return result, list(zip(asked, before, after, strict=True))


if __name__ == "__main__":
    done, said = run(common.options(Options, __doc__))
    for word, before, after in said[:10]:
        print(f"  {word:12} {before[:40]!r:44} {after!r}")
    common.save(done)
