"""Messages of OpenAI's clients and turns of ShareGPT in the files of jobs, both converted for chat templates."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField
from knapper.wire import json

Message = dict[str, str]  # role, content, and name where one is given: what chat templates take
Weight = Annotated[int, Meta(ge=0, le=1)]  # of a message in the loss, as OpenAI's files for fine-tuning have it

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


class WeightedMessage(ChatMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message of a row to train on."""

    weight: Weight | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"speaker": "from"}):
    """ShareGPT's."""

    speaker: str
    value: str
    weight: Weight | None = None

    def message(self, at: str) -> Message:
        """Raises InvalidField for a speaker whose role is not certain."""
        if self.speaker not in SPEAKERS:
            todo = 'Write other roles as {"role", "content"}, as the model\'s chat template knows them'
            raise InvalidField(f"{at}.from", self.speaker, ", ".join(SPEAKERS), todo)
        return {"role": SPEAKERS[self.speaker], "content": self.value}


def conversation(sent: Sequence[object], at: str) -> list[Message]:
    """A list of messages, all of one form. `at`: the field's name, for errors. Raises InvalidField."""
    messages, weights = weighted(sent, at)
    for i, weight in enumerate(weights):
        if weight is not None:
            raise InvalidField(f"{at}[{i}].weight", weight, "none here: only what an sft job may learn has weights")
    return messages


def weighted(sent: Sequence[object], at: str) -> tuple[list[Message], list[Weight | None]]:
    """The same with the weight of each message, None where it has none. Raises InvalidField."""
    if not 1 <= len(sent) <= limits.chat_messages_max:
        raise InvalidField(at, f"a list of {len(sent)}", f"1 to {limits.chat_messages_max} messages")
    shared = any(isinstance(each, dict) and "from" in each for each in sent)
    read: Sequence[Turn | WeightedMessage] = json.shape(sent, list[Turn] if shared else list[WeightedMessage], at)
    return [each.message(f"{at}[{i}]") for i, each in enumerate(read)], [each.weight for each in read]
