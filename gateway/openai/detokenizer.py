"""From tokens to text, as they come: never half a character, and never what stands for the end.

token -> its characters, once they are whole -> held back while they may begin a stop string -> the client
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from knapper.wire.progress import TokenEvent

_WINDOW_MAX = 64  # tokens that may wait for their last character's end; beyond that the bytes are simply not text
_CONTEXT_MAX = 16  # tokens of the prompt: some without text, and a character, to know whether a space begins the text


@dataclass(frozen=True)
class ScoredToken:
    """A token of the text. `offset`: where it begins, in characters."""

    token: int
    logprob: float | None  # None: nothing predicts the first token of all
    alternatives: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """The next characters of a text, and the tokens that begin in them."""

    text: str
    tokens: list[ScoredToken]


class Characters:
    """Decodes tokens one by one, after `before`. Special tokens have no text. Pieces add up to the text of all.

    The library's `DecodeStream` cannot tell an unfinished end, and raises at some bytes that are no text: decision 28.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = self._context(before)
        self._read = len(self._tokens)  # whose text has been given

    def add(self, token: int) -> str:
        """Whole characters that the token completes."""
        self._tokens.append(token)
        rest = self.rest()
        if rest.endswith("\ufffd") and len(self._tokens) - self._read < _WINDOW_MAX:
            return ""
        if rest or len(self._tokens) - self._read >= _WINDOW_MAX:
            del self._tokens[: self._read]  # the rest is what the next token is decoded behind
            self._read = len(self._tokens)
        return rest

    def rest(self) -> str:
        """What has not been given yet, an unfinished character as U+FFFD."""
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._read])) :]

    def _context(self, before: list[int]) -> list[int]:
        """The fewest of the last tokens that are whole characters."""
        for size in range(1, _CONTEXT_MAX + 1):
            text = self._decode(before[-size:])
            if text and not text.endswith("\ufffd"):
                return before[-size:]
        return []

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Detokenizer:
    """One sampled text after `prompt`. It begins at character `offset` of what the client sees."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: tuple[str, ...], offset: int = 0) -> None:
        self._characters = Characters(tokenizer, prompt)
        self._stops = stops
        self._given = offset
        self._held = ""
        self._waiting: list[ScoredToken] = []

    def add(self, drawn: TokenEvent) -> TextDelta:
        """What can be told with this token; with the last one, all that is left."""
        scored = ScoredToken(drawn.token, drawn.logprob, drawn.alternatives, self._given + len(self._held))
        if drawn.ending == "stop":
            return self._stop(scored)
        self._held += self._characters.add(drawn.token)
        self._waiting.append(scored)
        if drawn.ending == "length":
            return TextDelta(self._held + self._characters.rest(), self._waiting)
        return self._give(len(self._held) - self._perhaps_stop())

    def _give(self, size: int) -> TextDelta:
        text, self._held = self._held[:size], self._held[size:]
        self._given += size
        told = [scored for scored in self._waiting if scored.offset < self._given]
        self._waiting = self._waiting[len(told) :]
        return TextDelta(text, told)

    def _stop(self, last: ScoredToken) -> TextDelta:
        """The text ends before the stop string; without one, the last token is what ended it."""
        before = self._held + self._characters.rest()
        whole = self._held + self._characters.add(last.token)
        whole += self._characters.rest()
        found = [at for at in map(whole.find, self._stops) if at >= 0]
        if not found:
            return TextDelta(before, self._waiting)
        end = self._given + min(found)
        return TextDelta(whole[: min(found)], [scored for scored in [*self._waiting, last] if scored.offset < end])

    def _perhaps_stop(self) -> int:
        """How many of the last characters held may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
