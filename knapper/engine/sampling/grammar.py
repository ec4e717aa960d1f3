"""Constrained decoding: which tokens a grammar allows next, by llguidance. N sequences, V vocabulary.

A mask is laid over the logits before a token is drawn, so log-probabilities are those of the allowed tokens,
renormalised. Where a text may end, the model's end tokens are allowed; where it must, they alone are.
"""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from knapper.engine.models.config import Facts
from knapper.engine.transfer import to_device
from knapper.errors import InvalidField, UserError
from knapper.wire import grammars


class GrammarCompiler:
    """Compiles grammars for one vocabulary, whose prefix tree is built at the first: seconds for a large one."""

    def __init__(self, tokenizer: Tokenizer | None, facts: Facts) -> None:
        self._tokenizer, self._facts = tokenizer, facts
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def compile(self, grammar: str) -> "Grammar":
        """Not on the device's thread: a large grammar takes a second. Raises InvalidField."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._of_model(), grammar, log_level=0, limits=grammars.parser_limits())
        if matcher.is_error():
            reason = grammars.in_short(matcher.get_error())
            raise InvalidField("grammar", "not compiled", "one that llguidance compiles", f"The reason: {reason}")
        return Grammar(matcher, self._facts.vocab_size)

    def _of_model(self) -> Any:
        """The vocabulary as llguidance reads it. Raises InvalidField for a model whose texts have no bytes or end."""
        from llguidance import LLTokenizer

        if self._tokenizer is None or not self._facts.eos:
            raise InvalidField("grammar", "given", "none with this model, which has no tokenizer.json or no end token")
        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = LLTokenizer(
                        self._tokenizer.to_str(), n_vocab=self._facts.vocab_size, eos_token=list(self._facts.eos)
                    )
                except Exception as error:  # llguidance raises nothing more specific
                    allowed = f"none with this model, whose tokenizer llguidance does not read ({error})"
                    raise InvalidField("grammar", "given", allowed) from error
            return self._vocabulary


class Grammar:
    """A compiled grammar, from which every sequence of a request starts."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """How far one sequence is in its grammar. It follows the sequence's tokens, and nothing else."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed_V(self) -> NDArray[np.bool_]:
        """Which tokens may come next. Raises UserError when the grammar costs more than its limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._expect_sound()
        allowed_V = np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(bool)
        if not allowed_V.any():
            raise UserError("no token of this model continues the text as its grammar asks; simplify the schema")
        return allowed_V

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._matcher.consume_token(token)
        self._expect_sound()

    def _expect_sound(self) -> None:
        if self._matcher.is_error():
            reason = grammars.in_short(self._matcher.get_error())
            raise UserError(f"the grammar of this text is too complex to go on ({reason}); simplify the schema")


class Constrained(Protocol):
    """A sequence that may have a grammar."""

    @property
    def grammar(self) -> GrammarState | None: ...


def mask(sequences: Sequence[Constrained], logits_NV: Tensor) -> dict[int, Exception]:
    """Put -inf, in place, where a sequence's grammar allows no token. Rows of sequences without one are not touched.

    Returns the rows whose grammar fails, with their errors.
    """
    masks: dict[int, NDArray[np.bool_]] = {}
    failures: dict[int, Exception] = {}
    for row, sequence in enumerate(sequences):
        if sequence.grammar is not None:
            try:
                masks[row] = sequence.grammar.allowed_V()
            except Exception as error:  # noqa: BLE001  one sequence's grammar must not fail the others
                failures[row] = error
    if masks:
        rows = to_device(list(masks), logits_NV.device)
        allowed_MV = torch.from_numpy(np.stack(list(masks.values()))).to(logits_NV.device)
        logits_NV[rows] = logits_NV[rows].masked_fill(~allowed_MV, -torch.inf)
    return failures
