"""The choices of a response in OpenAI's format: of completions and chat completions, whole or in chunks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from gateway.openai.detokenizer import ScoredToken, TextDelta
from knapper.catalogue.call_reader import CallReader, Piece
from knapper.catalogue.tokenizer import Language
from knapper.catalogue.tool_calls import Calling
from knapper.catalogue.tools import ToolCall
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
    def chunk(self, index: int, delta: TextDelta, ending: Ending) -> Json | None:
        """A further chunk of a streamed choice; None while it has nothing to say."""


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

    def chunk(self, index: int, delta: TextDelta, ending: Ending) -> Json | None:
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


class ToolChatFormat(ChatFormat):
    """A chat that may call tools: calls are found in the text. A chunk has whole calls."""

    def __init__(self, language: Language, logprobs: int | None, calling: Calling, new_id: Callable[[], str]) -> None:
        super().__init__(language, logprobs)
        self._calling, self._new_id = calling, new_id
        self._readers: dict[int, CallReader] = {}  # of streamed choices
        self._tokens: dict[int, list[ScoredToken]] = {}  # whose text is not passed on yet

    def whole(self, index: int, delta: TextDelta, ending: Ending) -> Json:
        reader = self._reader()
        text, calls = split_pieces(reader.add(delta.text) + reader.end())
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [self._call(call) for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._scores(delta),
            "finish_reason": _finish_reason(ending, reader),
        }

    def chunk(self, index: int, delta: TextDelta, ending: Ending) -> Json | None:
        reader = self._readers.setdefault(index, self._reader())
        before = reader.calls
        text, calls = split_pieces(reader.add(delta.text) + (reader.end() if ending else []))
        tokens = self._tokens.pop(index, []) + delta.tokens
        if not (text or calls or ending):
            self._tokens[index] = tokens
            return None
        said: Json = {"content": text} if text else {}
        if calls:
            said["tool_calls"] = [{"index": before + i} | self._call(call) for i, call in enumerate(calls)]
        return {
            "index": index,
            "delta": said,
            "logprobs": self._scores(TextDelta(text, tokens)),
            "finish_reason": _finish_reason(ending, reader) or None,
        }

    def _reader(self) -> CallReader:
        reader = self._calling.reader()
        assert reader is not None, "the chat has tools"
        return reader

    def _call(self, call: ToolCall) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": self._calling.call_id(self._new_id()), "type": "function", "function": function}


def split_pieces(pieces: list[Piece]) -> tuple[str, list[ToolCall]]:
    """(text, calls) of the pieces."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [piece for piece in pieces if isinstance(piece, ToolCall)]


def _finish_reason(ending: Ending, reader: CallReader) -> str:
    return "tool_calls" if ending == "stop" and reader.calls else ending


def _encoded(scores: Json | None) -> msgspec.Raw:
    """The scores of one token as JSON: encoding those of a long response at once would take megabytes."""
    return msgspec.Raw(msgspec.json.encode(scores))


def _possible(scored: ScoredToken) -> list[tuple[int, float]]:
    return [
        (token, logprob) for token, logprob in scored.alternatives if math.isfinite(logprob) and logprob > _LOGPROB_MIN
    ]
