"""Incremental detokenization: never half a character, and never a stop string or an end-of-sequence token.

token -> its characters, once they are whole -> held back while they may begin a stop string -> the client
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Tokenizer

from knapper.wire.progress import TokenEvent

_WINDOW_MAX = 64  # tokens that may wait for the end of a character; longer sequences of bytes are not text
_CONTEXT_MAX = 16  # tokens of the prompt, enough for one character: it decides whether a space begins the text


@dataclass(frozen=True)
class ScoredToken:
    """A token of the text. `offset`: its first character."""

    token: int
    logprob: float | None  # None for the first token of the prompt, which nothing predicts
    alternatives: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """The next characters of a text, and the tokens that begin in them."""

    text: str
    tokens: list[ScoredToken]


class Characters:
    """Decodes tokens one by one, after `before`. Special tokens have no text but that in `shown`. The parts add up to
    the whole text.

    The library's `DecodeStream` does not report an unfinished end, and raises for some invalid bytes: decision 28.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: list[int], shown: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._tokens = self._context(before)
        self._read = len(self._tokens)  # tokens whose text was returned

    def add(self, token: int) -> str:
        """The characters that the token completes."""
        if token in self._shown:
            text = self.pending() + self._shown[token]
            self._tokens, self._read = [], 0
            return text
        self._tokens.append(token)
        pending = self.pending()
        if pending.endswith("\ufffd") and len(self._tokens) - self._read < _WINDOW_MAX:
            return ""
        if pending or len(self._tokens) - self._read >= _WINDOW_MAX:
            del self._tokens[: self._read]  # the others are the context of the next token
            self._read = len(self._tokens)
        return pending

    def pending(self) -> str:
        """The text not returned yet, with an unfinished character as U+FFFD."""
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._read])) :]

    def _context(self, before: list[int]) -> list[int]:
        """The shortest suffix of the tokens that decodes to whole characters."""
        for size in range(1, _CONTEXT_MAX + 1):
            text = self._decode(before[-size:])
            if text and not text.endswith("\ufffd"):
                return before[-size:]
        return []

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Detokenizer:
    """The text of one sequence after `prompt`. It begins at character `offset` of the client's text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stops: tuple[str, ...],
        offset: int = 0,
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._characters = Characters(tokenizer, prompt, shown)
        self._stops = stops
        self.stopped_by: str | None = None  # the stop string that ended the text
        self._sent = offset
        self._held = ""
        self._waiting: list[ScoredToken] = []

    def add(self, drawn: TokenEvent) -> TextDelta:
        """The text that can be sent after this token; after the last one, all that remains."""
        scored = ScoredToken(drawn.token, drawn.logprob, drawn.alternatives, self._sent + len(self._held))
        if drawn.ending == "stop":
            return self._stop(scored)
        self._held += self._characters.add(drawn.token)
        self._waiting.append(scored)
        if drawn.ending == "length":
            return TextDelta(self._held + self._characters.pending(), self._waiting)
        return self._send(len(self._held) - self._possible_stop())

    def _send(self, size: int) -> TextDelta:
        text, self._held = self._held[:size], self._held[size:]
        self._sent += size
        tokens = [scored for scored in self._waiting if scored.offset < self._sent]
        self._waiting = self._waiting[len(tokens) :]
        return TextDelta(text, tokens)

    def _stop(self, last: ScoredToken) -> TextDelta:
        """The text up to the stop string; without one, up to the last token, which ended the sequence."""
        before = self._held + self._characters.pending()
        whole = self._held + self._characters.add(last.token)
        whole += self._characters.pending()
        ends = [(index, stop) for stop in self._stops if (index := whole.find(stop)) >= 0]
        if not ends:
            return TextDelta(before, self._waiting)
        cut, self.stopped_by = min(ends)
        end = self._sent + cut
        return TextDelta(whole[:cut], [scored for scored in [*self._waiting, last] if scored.offset < end])

    def _possible_stop(self) -> int:
        """How many of the held characters, at their end, may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
