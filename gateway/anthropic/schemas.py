"""Requests of Anthropic's protocol, strict and bounded: each parameter but labels is honoured, or refused by name."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.openai.chats import Chat
from knapper import limits
from knapper.catalogue import chat_images
from knapper.catalogue.tool_fields import ToolName, call_as_template, use_of
from knapper.catalogue.tools import AgentMessage, Tool, ToolUse
from knapper.errors import InvalidField
from knapper.wire import grammars, image_files, json_values, types
from knapper.wire.image_files import NOT_FETCHED, ImageFile
from knapper.wire.json import decode

Name = Annotated[str, Meta(min_length=1, max_length=limits.text_chars_max)]
CallId = Annotated[str, Meta(min_length=1, max_length=limits.id_chars_max)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Refuses unknown fields."""


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text", forbid_unknown_fields=True):
    """`cache_control` changes nothing: what prompts share is kept anyway."""

    text: str
    cache_control: Any = None
    citations: None = None


class Base64Source(msgspec.Struct, frozen=True, kw_only=True, tag="base64", forbid_unknown_fields=True):
    media_type: str
    data: str


class UrlSource(msgspec.Struct, frozen=True, kw_only=True, tag="url", forbid_unknown_fields=True):
    """Refused: nothing is fetched."""

    url: str


class ImageBlock(msgspec.Struct, frozen=True, kw_only=True, tag="image", forbid_unknown_fields=True):
    source: Base64Source | UrlSource
    cache_control: Any = None

    def file(self, at: str) -> ImageFile:
        """Raises InvalidField, TooLarge."""
        if isinstance(self.source, UrlSource):
            raise InvalidField(f"{at}.source.url", self.source.url, "a source of the type base64", NOT_FETCHED)
        return image_files.of_base64(self.source.media_type, self.source.data, at, f"{at}.source.data")


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use", forbid_unknown_fields=True):
    id: CallId
    name: ToolName
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None


class ToolResultBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_result", forbid_unknown_fields=True):
    tool_use_id: CallId
    content: str | list[TextBlock] = ""
    is_error: bool | None = None
    cache_control: Any = None


Block = TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock
Blocks = Annotated[list[Block], Meta(max_length=limits.chat_messages_max)]


class AnthropicMessage(_Strict, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks

    def messages(self, at: str) -> list[AgentMessage]:
        """As templates take them: each result of a tool is a message of its own. Raises InvalidField."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        if self.role == "assistant":
            return [self._called(at)]
        messages: list[AgentMessage] = []
        own: list[chat_images.Part] = []  # of a message that is not yet among them
        for i, block in enumerate(self.content):
            place = f"{at}.content[{i}]"
            if isinstance(block, ToolUseBlock):
                raise InvalidField(f"{place}.type", "tool_use", "tool_use in the assistant's messages only")
            if isinstance(block, ToolResultBlock):
                messages += self._said(own)
                own = []
                messages.append({"role": "tool", "content": _result(block), "tool_call_id": block.tool_use_id})
            else:
                own.append(block.text if isinstance(block, TextBlock) else block.file(place))
        messages += self._said(own)
        if not messages:
            raise InvalidField(f"{at}.content", [], "at least one block")
        return messages

    def _said(self, parts: list[chat_images.Part]) -> list[AgentMessage]:
        return [{"role": self.role, "content": chat_images.content(parts, "\n")}] if parts else []

    def _called(self, at: str) -> AgentMessage:
        texts, calls = list[str](), list[dict[str, Any]]()
        for i, block in enumerate(self.content):
            if isinstance(block, TextBlock):
                texts.append(block.text)
            elif isinstance(block, ToolUseBlock):
                json_values.expect_shallow(block.input, f"{at}.content[{i}].input")
                calls.append(call_as_template(block.id, block.name, block.input))
            else:
                kind = "image" if isinstance(block, ImageBlock) else "tool_result"
                raise InvalidField(f"{at}.content[{i}].type", kind, f"{kind} in the user's messages only")
        message = {"role": "assistant", "content": "\n".join(texts)}
        return {**message, "tool_calls": calls} if calls else message


def _result(block: ToolResultBlock) -> str:
    text = block.content if isinstance(block.content, str) else _text(block.content)
    return f"Error: {text}" if block.is_error else text


def _text(blocks: Iterable[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


class CustomTool(_Strict, frozen=True, kw_only=True):
    """`strict` asks for calls that follow the schema: those that are forced do, and others are the model's own."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str = ""
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None  # asks for parts of calls as they come; they come whole


class AnthropicToolChoice(_Strict, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False


class Thinking(_Strict, frozen=True, kw_only=True):
    """`adaptive` lets the model think as it likes, which here is in its text."""

    type: Literal["disabled", "adaptive"]
    display: Any = None


class OutputFormat(_Strict, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(_Strict, frozen=True, kw_only=True):
    """`effort` is a label: the model has to be asked for it in words."""

    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(_Strict, frozen=True, kw_only=True):
    user_id: str | None = None


class CountRequest(_Strict, frozen=True, kw_only=True):
    """v1/messages/count_tokens"""

    model: Name
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=limits.chat_messages_max)]
    system: str | Annotated[list[TextBlock], Meta(max_length=limits.chat_messages_max)] = ""
    tools: Annotated[list[CustomTool], Meta(max_length=limits.tools_max)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None

    def conversation(self) -> list[AgentMessage]:
        """Raises InvalidField."""
        if self.messages[-1].role == "assistant":
            last = f"messages[{len(self.messages) - 1}].role"
            raise InvalidField(last, "assistant", "user at the end: the assistant is asked to answer")
        system = self.system if isinstance(self.system, str) else _text(self.system)
        messages: list[AgentMessage] = [{"role": "system", "content": system}] if system else []
        for i, message in enumerate(self.messages):
            messages += message.messages(f"messages[{i}]")
        return messages

    def tool_use(self) -> ToolUse:
        """Raises InvalidField."""
        tools = [Tool(each.name, each.description, each.input_schema) for each in self.tools or ()]
        choice = self.tool_choice or AnthropicToolChoice(type="auto")
        if (choice.name is not None) != (choice.type == "tool"):
            raise InvalidField("tool_choice.name", choice.name, 'a name with the type "tool", and none with any other')
        wanted: dict[str, Literal["none", "auto", "required"]] = {"auto": "auto", "none": "none", "any": "required"}
        return use_of(tools, wanted.get(choice.type, "auto"), choice.name, not choice.disable_parallel_tool_use)

    def answer(self) -> Mapping[str, Any] | None:
        """The part of a grammar that an answer in words must follow, if any. Raises InvalidField."""
        if self.output_config is None or self.output_config.format is None:
            return None
        return grammars.json_part(self.output_config.format.schema, "output_config.format.schema")

    def chat(self, params: types.SamplingParams) -> Chat:
        """Raises InvalidField."""
        conversation, files = chat_images.apart(self.conversation())
        return Chat(self.model, conversation, params, self.tool_use(), self.answer(), images=files)


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """v1/messages"""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    stream: bool = False
    stop_sequences: Annotated[list[str], Meta(max_length=limits.stop_sequences_max)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.temperature_max)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def params(self) -> types.SamplingParams:
        """Raises InvalidField."""
        if self.top_k == 0:
            raise InvalidField("top_k", 0, "-1 (all tokens), or at least 1")
        if "" in (self.stop_sequences or ()):
            raise InvalidField("stop_sequences", "", "texts of at least one character")
        return types.SamplingParams(
            max_tokens=self.max_tokens,
            stop_strings=tuple(self.stop_sequences or ()),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=-1 if self.top_k is None else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
        )


# ---- decoded in a worker process if the body is not small


def messages(body: bytes) -> tuple[Chat, bool]:
    """(chat, whether its answer is streamed). Raises UserError."""
    request = decode(body, MessagesRequest)
    return request.chat(request.params()), request.stream


def count(body: bytes) -> Chat:
    """Raises UserError."""
    return decode(body, CountRequest).chat(types.SamplingParams())
