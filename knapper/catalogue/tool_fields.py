"""The fields `tools`, `tool_choice` and `tool_calls` of chats, checked, as templates and formats take them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.catalogue import chat_images
from knapper.catalogue.conversations import ChatMessage, MessagePart
from knapper.catalogue.tools import AgentMessage, Tool, ToolUse
from knapper.errors import InvalidField
from knapper.wire import image_files, json_values

_IMAGE = "image_url"
ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class Function(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`strict` asks for calls that follow the schema: those that are forced do, and others are the model's own."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function

    def tool(self) -> Tool:
        return Tool(self.function.name, self.function.description or "", self.function.parameters or {})


class ChosenFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: ToolName


class ChosenTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: ChosenFunction


Tools = Annotated[list[FunctionTool], Meta(max_length=limits.tools_max)]
ToolChoice = Literal["none", "auto", "required"] | ChosenTool


def use_of(tools: list[Tool], choice: Literal["none", "auto", "required"], name: str | None, several: bool) -> ToolUse:
    """Raises InvalidField for two tools of one name, for too much of them, for parameters that are no object's schema,
    and for a choice that none of them is.
    """
    names = [tool.name for tool in tools]
    for i, tool in enumerate(tools):
        _expect_schema(tool.parameters, f"tools[{i}].parameters")
    if (size := len(msgspec.json.encode(tools))) > limits.tools_bytes_max:
        raise InvalidField("tools: bytes", size, f"up to {limits.tools_bytes_max}")
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise InvalidField("tools", twice, "each name once")
    if (name is not None or choice == "required") and not tools:
        raise InvalidField("tool_choice", name or choice, "none or auto, as there are no tools")
    if name is not None and name not in names:
        raise InvalidField("tool_choice", name, f"one of tools: {', '.join(names)}")
    return ToolUse(tuple(tools), "required" if name is not None else choice, name, several)


def _expect_schema(parameters: Mapping[str, Any], field: str) -> None:
    """What templates and formats of calls read of it; the rest is looked at where a call is forced."""
    json_values.expect_shallow(parameters, field)
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, dict):
        raise InvalidField(f"{field}.properties", properties, "an object: a schema for each name")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidField(f"{field}.required", required, "a list of names")


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: ToolName
    arguments: str = ""


class SentCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of an earlier answer. `index`: as chunks of streams have it."""

    id: Annotated[str, Meta(max_length=limits.id_chars_max)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def as_template(self, at: str) -> dict[str, Any]:
        arguments = arguments_of(self.function.arguments, f"{at}.function.arguments")
        return call_as_template(self.id, self.function.name, arguments)


class ImageUrl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`detail` is a label: a model reads an image in its own size."""

    url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class AgentMessagePart(MessagePart, frozen=True, kw_only=True):
    image_url: ImageUrl | None = None

    def part(self, at: str) -> chat_images.Part:
        """Raises InvalidField, TooLarge."""
        if self.type == "text":
            return self.text
        if self.type != _IMAGE:
            raise InvalidField(f"{at}.type", self.type, f"text, {_IMAGE}: models read nothing else")
        if self.image_url is None:
            raise InvalidField(f"{at}.image_url", None, image_files.DATA_URL, image_files.NOT_FETCHED)
        return image_files.of_url(self.image_url.url, at, f"{at}.image_url.url")


class AgentChatMessage(ChatMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message that may call tools, be the result of a call, or have images."""

    content: str | list[AgentMessagePart] | None = None  # type: ignore[assignment]  # of one part more
    tool_calls: Annotated[list[SentCall], Meta(max_length=limits.tools_max)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=limits.id_chars_max)] | None = None

    def agent_message(self, at: str) -> AgentMessage:
        """As templates take it. Raises InvalidField."""
        content = self.content or "" if self.tool_calls else self.content
        parts = content if isinstance(content, list) else []
        if seen := any(part.type == _IMAGE for part in parts):
            content = ""
        message: dict[str, Any] = {**msgspec.structs.replace(self, tool_calls=None, content=content).message(at)}
        if seen:
            message["content"] = chat_images.content([part.part(f"{at}.content[{i}]") for i, part in enumerate(parts)])
        if self.tool_call_id is not None and self.role != "tool":
            raise InvalidField(f"{at}.tool_call_id", self.tool_call_id, "none but in messages of the role tool")
        if self.tool_calls:
            calls = [call.as_template(f"{at}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls)]
            return {**message, "tool_calls": calls}
        return message if self.tool_call_id is None else {**message, "tool_call_id": self.tool_call_id}


def call_as_template(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call as chat templates take it: its arguments as an object, not as a text."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_of(text: str, field: str) -> dict[str, Any]:
    """Raises InvalidField for what is no JSON object."""
    try:
        arguments = json_values.of_text(text) if text.strip() else {}
    except json_values.NotJson:
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidField(field, text, f"a JSON object, as a text, of up to {limits.json_nesting_max} levels")
    return arguments
