"""Turns of an episode become sequences to train on, by their token ids alone: no text is tokenized again.

Where a prompt begins with all tokens of an earlier turn, prompt and answer, the turn goes on in that turn's sequence.
Where it does not, as when a chat template writes earlier turns otherwise, it begins another. So each sampled token is
in one sequence as sampled; wherever else it stands, it is only read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt. `retry`: how often its request had been sent before."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    retry: int = 0


@dataclass
class TrainingSequence:
    """A sequence; `sampled`: [first, end) of the parts that were sampled, `logprobs` of all of them."""

    tokens: list[int]
    sampled: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Go on with the part of the prompt that is new, and the answer."""
        self.tokens += answer.prompt[len(self.tokens) :]
        self.sampled.append((len(self.tokens), len(self.tokens) + len(answer.tokens)))
        self.tokens += answer.tokens
        self.logprobs += answer.logprobs


def answers(turns: Sequence[dict[str, Any]]) -> Iterator[Answer]:
    """Of turns as `/api/v1/captures/EPISODE` has them, all but those that a retry replaced."""
    kept: list[dict[str, Any]] = []
    for turn in turns:
        if turn["retry"]:  # its client never got the answer to the request before it
            lost = next((n for n in reversed(range(len(kept))) if kept[n]["prompt"] == turn["prompt"]), None)
            if lost is not None:
                del kept[lost]
        kept.append(turn)
    for turn in kept:
        for sequence in turn["sequences"]:
            yield Answer(turn["prompt"], sequence["tokens"], sequence["logprobs"], turn["retry"])


def joined(given: Iterator[Answer]) -> list[TrainingSequence]:
    """The sequences of all answers; one without tokens, or without a prompt to predict the first one from, has none."""
    ends: list[tuple[bytes, TrainingSequence]] = []  # what may go on, with its tokens as bytes
    sequences: list[TrainingSequence] = []
    for answer in sorted((each for each in given if each.prompt and each.tokens), key=lambda each: len(each.prompt)):
        prompt = _bytes(answer.prompt)
        before = [n for n, (whole, _) in enumerate(ends) if prompt.startswith(whole)]
        if before:
            _, sequence = ends.pop(max(before, key=lambda n: len(ends[n][0])))
        else:
            sequence = TrainingSequence([])
            sequences.append(sequence)
        sequence.add(answer)
        ends.append((_bytes(sequence.tokens), sequence))
    return sequences


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, "<i4").tobytes()
