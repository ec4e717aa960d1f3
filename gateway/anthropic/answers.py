"""Answers in the format of Anthropic's protocol: a message of blocks, whole or as server-sent events."""

import json
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.openai.chats import PreparedChat
from gateway.openai.samples import KeepAlive
from gateway.openai.turn import TurnEnd
from knapper.catalogue.call_reader import Piece
from knapper.catalogue.tools import ToolCall

Json = dict[str, Any]


class MessageFormat:
    """One answer. `new_id`: for the message and its calls."""

    def __init__(self, name: str, ready: PreparedChat, new_id: Callable[[], str]) -> None:
        self._name, self._ready, self._new_id = name, ready, new_id
        self._message_id = f"msg_{new_id()}"

    def whole(self, pieces: list[Piece | TurnEnd]) -> Json:
        """The message. The last piece is the end."""
        *said, end = pieces
        assert isinstance(end, TurnEnd)
        content = [self._block(piece) for piece in said if not isinstance(piece, TurnEnd)]
        return self._message(content, _stop(end), end.tokens)

    def opening(self) -> Json:
        """The message as it begins in a stream."""
        return self._message([], {"stop_reason": None, "stop_sequence": None}, 0)

    def _message(self, content: list[Json], stop: Json, tokens: int) -> Json:
        usage = {
            "input_tokens": len(self._ready.prompt), "output_tokens": tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }  # fmt: skip
        head = {"id": self._message_id, "type": "message", "role": "assistant", "model": self._name}
        return head | {"content": content} | stop | {"usage": usage}

    def _block(self, piece: Piece) -> Json:
        if isinstance(piece, str):
            return {"type": "text", "text": piece}
        return self.call(piece) | {"input": json.loads(piece.arguments)}

    def call(self, call: ToolCall) -> Json:
        """A call without its arguments."""
        identifier = self._ready.calling.call_id(self._new_id(), "toolu_")
        return {"type": "tool_use", "id": identifier, "name": call.name, "input": {}}


class MessageEvents:
    """The events of a streamed message."""

    def __init__(self, form: MessageFormat) -> None:
        self._form = form
        self._begun = False
        self._index = 0
        self._text_open = False

    def __call__(self, piece: object) -> list[bytes]:
        """The events for a piece, for the end, or for a KeepAlive."""
        events = [] if self._begun else [event("message_start", message=self._form.opening())]
        self._begun = True
        match piece:
            case KeepAlive():
                return [*events, event("ping")]
            case str():
                return [*events, *self._text(piece)]
            case ToolCall():
                return [*events, *self._close(), *self._call(piece)]
            case TurnEnd():
                return [*events, *self._close(), *_ended(piece)]
        raise AssertionError(f"no piece of a message: {piece!r}")

    def _text(self, text: str) -> list[bytes]:
        events = []
        if not self._text_open:
            self._text_open = True
            block = {"type": "text", "text": ""}
            events.append(event("content_block_start", index=self._index, content_block=block))
        delta = {"type": "text_delta", "text": text}
        return [*events, event("content_block_delta", index=self._index, delta=delta)]

    def _call(self, call: ToolCall) -> list[bytes]:
        index, self._index = self._index, self._index + 1
        return [
            event("content_block_start", index=index, content_block=self._form.call(call)),
            event(
                "content_block_delta",
                index=index,
                delta={"type": "input_json_delta", "partial_json": call.arguments},
            ),
            event("content_block_stop", index=index),
        ]

    def _close(self) -> list[bytes]:
        """End a block of text that is open."""
        if not self._text_open:
            return []
        self._text_open = False
        self._index += 1
        return [event("content_block_stop", index=self._index - 1)]


def event(name: str, **fields: Any) -> bytes:
    data = msgspec.json.encode({"type": name} | fields)
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def _ended(end: TurnEnd) -> list[bytes]:
    return [event("message_delta", delta=_stop(end), usage={"output_tokens": end.tokens}), event("message_stop")]


def _stop(end: TurnEnd) -> Json:
    if end.ending == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if end.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop}
    return {"stop_reason": "tool_use" if end.calls else "end_turn", "stop_sequence": None}
