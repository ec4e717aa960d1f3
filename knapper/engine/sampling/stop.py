"""Stop criteria of a sample: a stop token, or a stop string in the decoded text. Both stay in the output."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

# A decoded window may start inside a character, or lose a leading space: it gets this many extra tokens.
_edge_tokens: Final = 4


class StopCriteria:
    """The stop tokens and strings of one request."""

    def __init__(self, tokens: Sequence[int], strings: Sequence[str], tokenizer: Tokenizer | None) -> None:
        assert tokenizer is not None or not strings
        self._tokens = frozenset(tokens)
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._longest = max((len(string.encode()) for string in strings), default=0)

    def ended(self, sampled: Sequence[int]) -> bool:
        """Whether the newest sampled token ends the text. Called after each token."""
        return sampled[-1] in self._tokens or (bool(self._strings) and self._string_in(sampled))

    def _string_in(self, sampled: Sequence[int]) -> bool:
        """Decodes only a window: a string that the newest token completes lies in at most as many tokens as it has
        bytes.

        Tokens that decode to nothing widen the window.
        """
        assert self._tokenizer is not None
        window = self._longest + _edge_tokens
        while True:
            text = self._decode(sampled, window)
            if window >= len(sampled) or len(text.encode()) >= self._longest + _edge_tokens:
                return any(string in text for string in self._strings)
            window *= 2

    def _decode(self, sampled: Sequence[int], window: int) -> str:
        """The text of the last tokens, from a whole character on: `ByteFallback` decodes nothing after half of one."""
        assert self._tokenizer is not None
        text, size = "\ufffd", window
        while text.startswith("\ufffd") and size > window - _edge_tokens:
            text = str(self._tokenizer.decode(list(sampled[-size:]), skip_special_tokens=False))
            size = 0 if size >= len(sampled) else size - 1
        return text
