"""Answers in the format of the Responses protocol: a response of items, whole or as server-sent events."""

from typing import Any

import msgspec

from gateway.openai.chats import PreparedChat
from gateway.openai.samples import KeepAlive
from gateway.openai.turn import TurnEnd
from gateway.services import Services
from knapper.catalogue.call_reader import Piece
from knapper.catalogue.tools import ToolCall

Json = dict[str, Any]


class ItemFormat:
    """One response. `echoed`: its fields that say what was asked."""

    def __init__(self, echoed: Json, ready: PreparedChat, gateway: Services) -> None:
        self._ready, self._new_id = ready, gateway.new_id
        self._head = {
            "id": f"resp_{gateway.new_id()}",
            "object": "response",
            "created_at": int(gateway.clock()),
        } | echoed

    def whole(self, pieces: list[Piece | TurnEnd]) -> Json:
        """The response. The last piece is the end."""
        *said, end = pieces
        assert isinstance(end, TurnEnd)
        items = [self.item(piece) for piece in said if not isinstance(piece, TurnEnd)]
        return self.response([self.ended(item, piece) for item, piece in zip(items, said, strict=True)], end)

    def response(self, output: list[Json], end: TurnEnd | None) -> Json:
        """`end` None: it goes on."""
        if end is None:
            return self._head | {
                "status": "in_progress",
                "error": None,
                "incomplete_details": None,
                "output": output,
                "usage": None,
            }
        prompt, cut = len(self._ready.prompt), end.ending == "length"
        usage = {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": end.tokens,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + end.tokens,
        }  # fmt: skip
        details = {"reason": "max_output_tokens"} if cut else None
        status = "incomplete" if cut else "completed"
        return self._head | {
            "status": status, "incomplete_details": details, "output": output, "usage": usage,
        }  # fmt: skip

    def item(self, piece: Piece) -> Json:
        """As it begins: without its text or arguments."""
        if isinstance(piece, str):
            item = {"type": "message", "id": f"msg_{self._new_id()}", "role": "assistant", "content": []}
        else:
            call_id = self._ready.calling.call_id(self._new_id())
            item = {"type": "function_call", "id": f"fc_{self._new_id()}", "call_id": call_id, "name": piece.name}
            item["arguments"] = ""
        return item | {"status": "in_progress"}

    def ended(self, item: Json, piece: Piece | TurnEnd) -> Json:
        """The item with all of its piece."""
        if isinstance(piece, ToolCall):
            return item | {"arguments": piece.arguments, "status": "completed"}
        return item | {"content": [text_part(str(piece))], "status": "completed"}


class ItemEvents:
    """The events of a streamed response."""

    def __init__(self, form: ItemFormat) -> None:
        self._form = form
        self._number = 0
        self._done: list[Json] = []
        self._message: Json | None = None  # the item of a text that is open
        self._text = ""

    def __call__(self, piece: object) -> list[bytes]:
        """The events for a piece, for the end, or for a KeepAlive."""
        if isinstance(piece, KeepAlive):
            return [f": {piece.reason}\n\n".encode()]
        events = [] if self._number else self._begin()
        match piece:
            case str():
                return [*events, *self._say(piece)]
            case ToolCall():
                return [*events, *self._close(), *self._call(piece)]
            case TurnEnd():
                closing = self._close()
                response = self._form.response(self._done, piece)
                return [*events, *closing, self._event(f"response.{response['status']}", response=response)]
        raise AssertionError(f"no piece of a response: {piece!r}")

    def failed(self, error: Json) -> bytes:
        """The last event of a stream that broke. `error`: code, message and param."""
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _begin(self) -> list[bytes]:
        response = self._form.response([], None)
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def _say(self, text: str) -> list[bytes]:
        events = []
        if self._message is None:
            self._message, self._text = self._form.item(text), ""
            events = [
                self._item_event("response.output_item.added", item=self._message),
                self._part_event("response.content_part.added", part=text_part("")),
            ]
        self._text += text
        return [*events, self._part_event("response.output_text.delta", delta=text, logprobs=[])]

    def _close(self) -> list[bytes]:
        """End the item of a text that is open."""
        if self._message is None:
            return []
        item = self._form.ended(self._message, self._text)
        events = [
            self._part_event("response.output_text.done", text=self._text, logprobs=[]),
            self._part_event("response.content_part.done", part=text_part(self._text)),
            self._item_event("response.output_item.done", item=item),
        ]
        self._message = None
        self._done.append(item)
        return events

    def _call(self, call: ToolCall) -> list[bytes]:
        begun = self._form.item(call)
        item = self._form.ended(begun, call)
        at = {"item_id": item["id"]}
        arguments = "response.function_call_arguments"
        events = [
            self._item_event("response.output_item.added", item=begun),
            self._item_event(f"{arguments}.delta", delta=call.arguments, **at),
            self._item_event(f"{arguments}.done", arguments=call.arguments, name=call.name, **at),
            self._item_event("response.output_item.done", item=item),
        ]
        self._done.append(item)
        return events

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        assert self._message is not None, "a text is open"
        return self._item_event(kind, item_id=self._message["id"], content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, output_index=len(self._done), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number} | fields)
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
