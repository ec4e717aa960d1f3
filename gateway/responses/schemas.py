"""Requests of the Responses protocol, strict and bounded: each parameter but labels is honoured, or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.openai.chats import Chat
from gateway.openai.response_formats import NamedSchema, ResponseFormat
from knapper import limits
from knapper.catalogue import chat_images
from knapper.catalogue.tool_fields import ToolName, arguments_of, call_as_template, use_of
from knapper.catalogue.tools import AgentMessage, Tool, ToolUse
from knapper.errors import InvalidField
from knapper.wire import image_files, json, types

Name = Annotated[str, Meta(min_length=1, max_length=limits.text_chars_max)]
CallId = Annotated[str, Meta(min_length=1, max_length=limits.id_chars_max)]
_TEXTS = ("input_text", "output_text", "text")
_IMAGE = "input_image"
_ROLES = {"developer": "system"}  # which chat templates do not know
_ITEMS = "a message, function_call or function_call_output"

# Unserved parameters: (values without an effect, what is allowed).
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((None, False), "false: nothing is stored, whatever a request leaves out"),
    "previous_response_id": ((None,), "none: nothing is stored, so send the whole conversation as input"),
    "conversation": ((None,), "none: nothing is stored, so send the whole conversation as input"),
    "background": ((None, False), "false: an answer comes on the connection that asked for it"),
    "prompt": ((None,), "none: nothing is stored"),
    "include": ((None, [], ["reasoning.encrypted_content"]), "[]: an answer has nothing else"),
    "max_tool_calls": ((None,), "none: tools are called by the client"),
    "service_tier": ((None, "auto", "default"), "auto"),
    "top_logprobs": ((None, 0), "0; v1/chat/completions has log-probabilities"),
    "truncation": ((None, "disabled"), "disabled: nothing is cut in silence"),
}


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Refuses unknown fields. Items come back with what answers have: an id, a status."""


class ItemPart(_Strict, frozen=True, kw_only=True):
    """A text, or an image by a data: URL, whose `detail` is a label."""

    type: str
    text: str = ""
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["low", "high", "auto", "original"] | None = None
    annotations: list[Any] = []
    logprobs: list[Any] | None = None


class MessageItem(_Strict, frozen=True, kw_only=True):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ItemPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(_Strict, frozen=True, kw_only=True):
    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutputItem(_Strict, frozen=True, kw_only=True):
    type: Literal["function_call_output"]
    call_id: CallId
    output: str | list[ItemPart]
    id: str | None = None
    status: str | None = None


class FlatTool(_Strict, frozen=True, kw_only=True):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(_Strict, frozen=True, kw_only=True):
    type: Literal["function"]
    name: ToolName


class TextFormat(_Strict, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(_Strict, frozen=True, kw_only=True):
    """`verbosity` is a label: the model has to be asked for it in words."""

    format: TextFormat = TextFormat()
    verbosity: str | None = None


class Reasoning(_Strict, frozen=True, kw_only=True):
    effort: Literal["none"] | None = None
    summary: str | None = None


class ObfuscationOptions(_Strict, frozen=True, kw_only=True):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(_Strict, frozen=True, kw_only=True):
    """v1/responses"""

    model: Name
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=limits.chat_messages_max)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.temperature_max)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: ObfuscationOptions | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=limits.tools_max)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None  # labels for the caller's own use
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    store: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    include: Any = None
    max_tool_calls: Any = None
    service_tier: Any = None
    top_logprobs: Any = None
    truncation: Any = None

    def conversation_of(self) -> list[AgentMessage]:
        """Raises InvalidField."""
        messages: list[AgentMessage] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for i, item in enumerate(self.input):
            message = _message(item, f"input[{i}]")
            if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
                calls = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
                messages[-1] = {**messages[-1], "tool_calls": calls}
            else:
                messages.append(message)
        return messages

    def tool_use(self) -> ToolUse:
        """Raises InvalidField."""
        tools = [Tool(each.name, each.description or "", each.parameters or {}) for each in self.tools or ()]
        named = self.tool_choice.name if isinstance(self.tool_choice, FlatChoice) else None
        choice = "auto" if isinstance(self.tool_choice, FlatChoice) or self.tool_choice is None else self.tool_choice
        return use_of(tools, choice, named, self.parallel_tool_calls is not False)

    def answer(self) -> Mapping[str, Any] | None:
        """The part of a grammar that an answer in words must follow, if any. Raises InvalidField."""
        if self.text is None:
            return None
        asked = self.text.format
        schema = None if asked.schema is None else NamedSchema(name=asked.name or "schema", schema=asked.schema)
        return ResponseFormat(type=asked.type, json_schema=schema).part("text.format")

    def params(self) -> types.SamplingParams:
        """Raises InvalidField for unserved values."""
        for name, (neutral, allowed) in _UNSERVED.items():
            if getattr(self, name) not in neutral:
                raise InvalidField(name, getattr(self, name), allowed)
        return types.SamplingParams(
            max_tokens=self.max_output_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )


def _message(item: dict[str, Any], at: str) -> AgentMessage:
    """An item as templates take it. Raises InvalidField."""
    match item.get("type", "message"):
        case "message":
            message = json.shape(item, MessageItem, at)
            content = _content(message.content, f"{at}.content")
            return {"role": _ROLES.get(message.role, message.role), "content": content}
        case "function_call":
            call = json.shape(item, FunctionCallItem, at)
            arguments = arguments_of(call.arguments, f"{at}.arguments")
            called = [call_as_template(call.call_id, call.name, arguments)]
            return {"role": "assistant", "content": "", "tool_calls": called}
        case "function_call_output":
            result = json.shape(item, FunctionOutputItem, at)
            return {"role": "tool", "content": _text(result.output, f"{at}.output"), "tool_call_id": result.call_id}
    raise InvalidField(f"{at}.type", item.get("type"), _ITEMS)


def _text(content: str | list[ItemPart], at: str) -> str:
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type not in _TEXTS:
            raise InvalidField(f"{at}[{i}].type", part.type, f"{', '.join(_TEXTS)}: nothing else is read here")
    return "".join(part.text for part in content)


def _content(content: str | list[ItemPart], at: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return chat_images.content([_part(part, f"{at}[{i}]") for i, part in enumerate(content)])


def _part(part: ItemPart, at: str) -> chat_images.Part:
    if part.type in _TEXTS:
        return part.text
    if part.type != _IMAGE:
        raise InvalidField(f"{at}.type", part.type, f"{', '.join(_TEXTS)}, {_IMAGE}: models read nothing else")
    if part.file_id is not None or part.image_url is None:
        raise InvalidField(f"{at}.image_url", part.image_url, image_files.DATA_URL, image_files.NOT_FETCHED)
    return image_files.of_url(part.image_url, at, f"{at}.image_url")


@dataclass(frozen=True)
class ResponseOptions:
    """`echoed`: the fields of the answer that say what was asked."""

    stream: bool
    echoed: dict[str, Any]


def responses(body: bytes) -> tuple[Chat, ResponseOptions]:
    """Decoded in a worker process if the body is not small. Raises UserError."""
    request = json.decode(body, ResponsesRequest)
    conversation, files = chat_images.apart(request.conversation_of())
    chat = Chat(request.model, conversation, request.params(), request.tool_use(), request.answer(), images=files)
    echoed = {
        "model": request.model, "instructions": request.instructions, "metadata": request.metadata or {},
        "max_output_tokens": request.max_output_tokens, "temperature": chat.params.temperature,
        "top_p": chat.params.top_p, "parallel_tool_calls": chat.use.several, "previous_response_id": None,
        "tool_choice": "auto" if request.tool_choice is None else msgspec.to_builtins(request.tool_choice),
        "tools": [_echoed_tool(tool) for tool in request.tools or ()], "truncation": "disabled", "store": False,
        "text": {"format": _echoed_format(request.text)}, "reasoning": {"effort": None, "summary": None},
        "user": request.user,
    }  # fmt: skip
    return chat, ResponseOptions(bool(request.stream), echoed)


def _echoed_tool(tool: FlatTool) -> dict[str, Any]:
    return {**msgspec.to_builtins(tool), "parameters": tool.parameters or {}, "strict": bool(tool.strict)}


def _echoed_format(text: TextConfig | None) -> dict[str, Any]:
    asked = TextFormat() if text is None else text.format
    return {name: value for name, value in msgspec.to_builtins(asked).items() if value is not None}
