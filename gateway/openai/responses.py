"""The choices of a response in OpenAI's format: of completions and chat completions, whole or in chunks."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

from gateway.openai.detokenizer import ScoredToken, TextDelta
from knapper.catalogue.tokenizer import Language
from knapper.wire.progress import Ending

Json = dict[str, Any]
_LOGPROB_MIN = -9999.0  # empty cells, and tokens that top_k and top_p cut off, are far below


class ChoiceFormat(ABC):
    """The format of one request's choices. `logprobs`: the number of alternatives to show, or None for no scores."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, language: Language, logprobs: int | None) -> None:
        self._language = language
        self._logprobs = logprobs

    @abstractmethod
    def whole(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        """A whole choice."""

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """The first chunk of a streamed choice, or None if it needs none."""

    @abstractmethod
    def chunk(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        """A further chunk of a streamed choice."""


class CompletionFormat(ChoiceFormat):
    """`echoed`: the text of each prompt, which precedes that of its choices; empty for no echo."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, language: Language, logprobs: int | None, echoed: list[str], choices: int) -> None:
        super().__init__(language, logprobs)
        self._echoed = echoed
        self._choices = choices

    def whole(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        return self.chunk(index, delta, ending)

    def opening(self, index: int) -> Json | None:
        if not self._echoed:
            return None
        return self.chunk(index, TextDelta(self._echoed[index // self._choices], []), "")

    def chunk(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        logprobs = None if self._logprobs is None else self._scores(delta.tokens, self._logprobs)
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": ending or None}

    def _scores(self, tokens: list[ScoredToken], k: int) -> Json:
        return {
            "tokens": [self._language.word(scored.token) for scored in tokens],
            "token_logprobs": [scored.logprob for scored in tokens],
            "top_logprobs": [_encoded(self._likeliest(scored)) for scored in tokens] if k else None,
            "text_offset": [scored.offset for scored in tokens],
        }

    def _likeliest(self, scored: ScoredToken) -> dict[str, float] | None:
        """The alternatives and the token itself. Of several tokens with the same text, the likeliest is shown."""
        if scored.logprob is None:
            return None
        logprobs: dict[str, float] = {}
        for token, logprob in [*_possible(scored), (scored.token, scored.logprob)]:
            logprobs.setdefault(self._language.word(token), logprob)
        return logprobs


class ChatFormat(ChoiceFormat):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._scores(delta), "finish_reason": ending}

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        content = {"content": delta.text} if delta.text else {}
        return {"index": index, "delta": content, "logprobs": self._scores(delta), "finish_reason": ending or None}

    def _scores(self, delta: TextDelta) -> Json | None:
        if self._logprobs is None:
            return None
        content = [
            _encoded(
                self._score(scored.token, scored.logprob)
                | {"top_logprobs": [self._score(token, logprob) for token, logprob in _possible(scored)]}
            )
            for scored in delta.tokens
        ]
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float | None) -> Json:
        """`bytes` is null if the token is no whole number of characters."""
        word = self._language.word(token)
        return {"token": word, "logprob": logprob, "bytes": None if "\ufffd" in word else list(word.encode())}


def _encoded(scores: Json | None) -> msgspec.Raw:
    """The scores of one token as JSON: encoding those of a long response at once would take megabytes."""
    return msgspec.Raw(msgspec.json.encode(scores))


def _possible(scored: ScoredToken) -> list[tuple[int, float]]:
    return [
        (token, logprob) for token, logprob in scored.alternatives if math.isfinite(logprob) and logprob > _LOGPROB_MIN
    ]
