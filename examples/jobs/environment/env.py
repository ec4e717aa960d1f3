"""Guess a number from 1 to 9: after each wrong guess the environment says whether to go higher or lower."""

import random
import re
from typing import Any

Answer = tuple[list[dict[str, str]], float, bool]  # messages, reward, done


class Environment:
    def reset(self, prompt: str, answer: Any) -> list[dict[str, str]]:  # noqa: ARG002  the rows have none
        self.number, self.guesses = random.randint(1, 9), 0  # seeded by the job
        return [{"role": "user", "content": prompt}]

    def step(self, message: dict[str, Any]) -> Answer:
        self.guesses += 1
        found = re.search(r"\d+", message["content"])
        if found is None:
            return [{"role": "user", "content": "Say only a number from 1 to 9."}], -0.1, False
        guess = int(found[0])
        if guess == self.number:
            return [], 1.0 / self.guesses, True
        near = 0.1 * (1 - min(abs(guess - self.number), 9) / 9)
        hint = "Higher." if guess < self.number else "Lower."
        return [{"role": "user", "content": hint}], near, False
