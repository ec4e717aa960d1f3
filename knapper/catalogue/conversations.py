"""Messages of OpenAI's clients and turns of ShareGPT, both converted for chat templates.

The gateway's `/v1` and the files of jobs read messages here, so that what one takes, the other does.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField
from knapper.wire import json

Message = dict[str, str]  # role, content, and name where one is given: what chat templates take

# Who speaks, as collections of ShareGPT's form call them -> as chat templates do.
SPEAKERS: Final = {
    "system": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "assistant": "assistant",
}  # fmt: skip


class MessagePart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message. Those that are not text have other fields, and are refused by their type."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields below `name` are those of answers that clients send back; they must say nothing."""

    role: Annotated[str, Meta(min_length=1, max_length=limits.role_chars_max)]
    content: str | list[MessagePart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = None

    def message(self, at: str) -> Message:
        """As templates take it. Raises InvalidField."""
        if self.tool_calls or self.annotations:
            raise InvalidField(f"{at}.tool_calls", "given", "none: tools are not served")
        if self.content is None:
            raise InvalidField(f"{at}.content", None, "a text")
        named = {} if self.name is None else {"name": self.name}
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content} | named
        for i, part in enumerate(self.content):
            if part.type != "text":
                raise InvalidField(f"{at}.content[{i}].type", part.type, "text: the model reads nothing else")
        return {"role": self.role, "content": "".join(part.text for part in self.content)} | named


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"speaker": "from"}):
    """ShareGPT's. `weight` comes with some collections, and must say nothing."""

    speaker: str
    value: str
    weight: None = None

    def message(self, at: str) -> Message:
        """Raises InvalidField for a speaker whose role is not certain."""
        if self.speaker not in SPEAKERS:
            todo = 'Write other roles as {"role", "content"}, as the model\'s chat template knows them'
            raise InvalidField(f"{at}.from", self.speaker, ", ".join(SPEAKERS), todo)
        return {"role": SPEAKERS[self.speaker], "content": self.value}


def conversation(sent: Sequence[object], at: str) -> list[Message]:
    """A list of messages, all of one form. `at`: the field's name, for errors. Raises InvalidField."""
    if not 1 <= len(sent) <= limits.chat_messages_max:
        raise InvalidField(at, f"a list of {len(sent)}", f"1 to {limits.chat_messages_max} messages")
    if any(isinstance(each, dict) and "from" in each for each in sent):
        return [turn.message(f"{at}[{i}]") for i, turn in enumerate(json.shape(sent, list[Turn], at))]
    return [message.message(f"{at}[{i}]") for i, message in enumerate(json.shape(sent, list[ChatMessage], at))]
