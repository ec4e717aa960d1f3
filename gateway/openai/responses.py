"""Answers as OpenAI's clients read them: of completions, and of chat completions, whole or in chunks."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

from gateway.openai.detokenizer import ScoredToken, TextDelta
from knapper.catalogue.tokenizer import Language
from knapper.wire.progress import Ending

Json = dict[str, Any]
_LIKELIEST_MIN = -9999.0  # a cell that holds no alternative is far below; so is what top_k and top_p cut off


class ChoiceFormat(ABC):
    """The form of one request's choices. `logprobs`: alternatives that the client wants to see, or None."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, language: Language, logprobs: int | None) -> None:
        self._language = language
        self._logprobs = logprobs

    @abstractmethod
    def whole(self, index: int, piece: TextDelta, ending: Ending) -> Json:
        """A choice."""

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """What a streamed choice begins with."""

    @abstractmethod
    def chunk(self, index: int, piece: TextDelta, ending: Ending) -> Json:
        """What a streamed choice goes on with."""


class CompletionShape(ChoiceFormat):
    """`echoed`: for each prompt its text, to stand before the choices' own."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, language: Language, logprobs: int | None, echoed: list[str], choices: int) -> None:
        super().__init__(language, logprobs)
        self._echoed = echoed
        self._choices = choices

    def whole(self, index: int, piece: TextDelta, ending: Ending) -> Json:
        return self.chunk(index, piece, ending)

    def opening(self, index: int) -> Json | None:
        if not self._echoed:
            return None
        return self.chunk(index, TextDelta(self._echoed[index // self._choices], []), "")

    def chunk(self, index: int, piece: TextDelta, ending: Ending) -> Json:
        logprobs = None if self._logprobs is None else self._scores(piece.tokens, self._logprobs)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": ending or None}

    def _scores(self, tokens: list[ScoredToken], k: int) -> Json:
        return {
            "tokens": [self._language.word(scored.token) for scored in tokens],
            "token_logprobs": [scored.logprob for scored in tokens],
            "top_logprobs": [_encoded(self._likeliest(scored)) for scored in tokens] if k else None,
            "text_offset": [scored.offset for scored in tokens],
        }

    def _likeliest(self, scored: ScoredToken) -> dict[str, float] | None:
        """With the token itself. Several tokens may read alike; the likeliest of them stands for all."""
        if scored.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in [*_possible(scored), (scored.token, scored.logprob)]:
            found.setdefault(self._language.word(token), logprob)
        return found


class ChatShape(ChoiceFormat):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, piece: TextDelta, ending: Ending) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._scores(piece), "finish_reason": ending}

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: TextDelta, ending: Ending) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "logprobs": self._scores(piece), "finish_reason": ending or None}

    def _scores(self, piece: TextDelta) -> Json | None:
        if self._logprobs is None:
            return None
        content = [
            _encoded(
                self._score(scored.token, scored.logprob)
                | {"top_logprobs": [self._score(token, logprob) for token, logprob in _possible(scored)]}
            )
            for scored in piece.tokens
        ]
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float | None) -> Json:
        """`bytes` are told where the token is whole characters."""
        word = self._language.word(token)
        return {"token": word, "logprob": logprob, "bytes": None if "\ufffd" in word else list(word.encode())}


def _encoded(scores: Json | None) -> msgspec.Raw:
    """Of one token: those of a long answer with many alternatives would be encoded in one go, and take megabytes."""
    return msgspec.Raw(msgspec.json.encode(scores))


def _possible(scored: ScoredToken) -> list[tuple[int, float]]:
    return [
        (token, logprob)
        for token, logprob in scored.alternatives
        if math.isfinite(logprob) and logprob > _LIKELIEST_MIN
    ]
