"""Tokenized rows, with the tokens that the loss counts.

T tokens of an example.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knapper.catalogue.conversations import Message
from knapper.catalogue.tokenizer import Language
from knapper.errors import InvalidField, UserError
from knapper.jobs.rows import Completion, CompletionRow, PairRow, Prompt, SftRow, Weights
from knapper.wire.types import Datum, Int32

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """`counts_T`: whether the loss counts the prediction of this token; never of the first."""

    tokens_T: Int32
    counts_T: Mask

    @property
    def counted(self) -> int:
        return int(self.counts_T.sum())

    def datum(self, weight: float) -> Datum:
        """For cross_entropy: each counted token weighs `weight`."""
        weights = self.counts_T[1:].astype(np.float32) * np.float32(weight)
        return Datum(self.tokens_T[:-1], {"target_tokens": self.tokens_T[1:].astype(np.int64), "weights": weights})


@dataclass(frozen=True)
class RowTokenizer:
    """`now`: the date for chat templates, in seconds since the epoch; constant for a job.

    `tokens_max`: of one example; a longer one is an error, and never truncated.
    """

    language: Language
    now: float
    tokens_max: int

    def prompt(self, prompt: Prompt) -> list[int]:
        """Up to where the model continues."""
        if isinstance(prompt, str):
            return self.language.encode(prompt)
        return self.language.chat(prompt, self.now, {})

    def completion(self, tokens: Sequence[int]) -> str:
        return str(self.language.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def answered(self, prompt: Prompt, completion: Completion, weights: Weights = ()) -> Example:
        """The prompt, the completion, and the token that ends a text; the loss counts what follows the prompt.

        Of following messages, it counts only what the model itself would write, where their weight is not 0.
        """
        if not isinstance(completion, str):
            assert not isinstance(prompt, str), "messages follow messages"
            return self._chat([*prompt, *completion], ("assistant",), len(prompt), weights)
        before = self.prompt(prompt)
        after = self.language.tokenizer.encode(completion, add_special_tokens=False).ids
        end = [] if self.language.end is None else [self.language.end]
        tokens = [*before, *after, *end]
        return self._example(tokens, np.arange(len(tokens)) >= len(before))

    def pair(self, row: PairRow) -> tuple[Example, Example]:
        """(chosen, rejected)"""
        return self.answered(row.prompt, row.chosen), self.answered(row.prompt, row.rejected)

    def sft(self, row: SftRow, loss_on: str | Sequence[str]) -> Example:
        if isinstance(row, CompletionRow):
            if loss_on != "all":
                return self.answered(row.prompt, row.completion, row.weights)
            if isinstance(row.prompt, str) or isinstance(row.completion, str):
                return _all(self.answered(row.prompt, row.completion))
            return self._chat([*row.prompt, *row.completion], None, len(row.prompt), row.weights)
        roles = ("assistant",) if loss_on == "completions" else loss_on
        return self._chat(row.messages, None if roles == "all" else roles, 0, row.weights)

    def _chat(
        self, messages: Sequence[Message], roles: Sequence[str] | None, first: int = 0, weights: Weights = ()
    ) -> Example:
        """`roles`: whose messages count, from `first` on; of an assistant what the model itself would write.

        None: every token counts. `weights`: of the messages from `first` on; one of weight 0 does not count.
        """
        whole = self.language.render(messages, self.now, {}, answering=False)
        encoded = self.language.tokenizer.encode(whole, add_special_tokens=False)
        left_out = {n for n, weight in enumerate(weights, first) if weight == 0}
        starts = np.array([begin for begin, _ in encoded.offsets])

        def said_by(numbers: Iterable[int]) -> Mask:
            counts = np.zeros(len(starts), np.bool_)
            for begin, end in [self._span(messages, n, whole) for n in numbers]:
                counts |= (starts >= begin) & (starts < end)
            return counts

        if roles is None:
            return self._example(encoded.ids, ~said_by(sorted(left_out)))
        counted = [n for n, message in enumerate(messages) if n >= first and message["role"] in roles]
        return self._example(encoded.ids, said_by(n for n in counted if n not in left_out))

    def _span(self, messages: Sequence[Message], n: int, whole: str) -> tuple[int, int]:
        """(first, end) in characters of what message n adds to the text of those before it."""
        assistant = messages[n]["role"] == "assistant"
        before = self.language.render(messages[:n], self.now, {}, answering=assistant) if n or assistant else ""
        until = self.language.render(messages[: n + 1], self.now, {}, answering=False).rstrip()
        if not (whole.startswith(until) and until.startswith(before)):
            raise UserError(
                f"the model's chat template changes message {n} when others follow it: the tokens to learn "
                "cannot be located; allowed: rows in which only the last message has its role, or `loss_on: all`"
            )
        return len(before), len(until)

    def _example(self, tokens: Sequence[int], counts: Mask) -> Example:
        if len(tokens) < 2:
            raise InvalidField("its length in tokens", len(tokens), "at least 2")
        if len(tokens) > self.tokens_max:
            raise InvalidField(
                "its length in tokens", len(tokens), f"at most {self.tokens_max}",
                "Shorten or remove the row, or raise max_tokens if the model's context allows it: nothing is cut",
            )  # fmt: skip
        counts = counts.copy()
        counts[0] = False
        if not counts.any():
            raise InvalidField("its tokens to learn", 0, "at least 1")
        return Example(np.array(tokens, np.int32), counts)


def pack(examples: Sequence[Example], tokens_max: int) -> list[Example]:
    """Pack examples into sequences, in order, as long as they fit; none is split."""
    packed: list[list[Example]] = []
    capacity = 0
    for example in examples:
        if len(example.tokens_T) > capacity:
            packed.append([])
            capacity = tokens_max
        packed[-1].append(example)
        capacity -= len(example.tokens_T)
    return [
        Example(np.concatenate([each.tokens_T for each in group]), np.concatenate([each.counts_T for each in group]))
        for group in packed
    ]


def _all(example: Example) -> Example:
    return Example(example.tokens_T, np.arange(len(example.tokens_T)) > 0)
