"""Requests of the OpenAI protocol, strict and bounded: each parameter but labels is honoured, or refused by name.

Defaults are OpenAI's. `top_k`, `ignore_eos` and `chat_template_kwargs` are additions that other servers have too. An
unserved parameter is accepted if its value has no effect, since clients send it anyway.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from gateway.openai.chats import Chat
from gateway.openai.response_formats import ResponseFormat
from knapper import limits
from knapper.catalogue import chat_images
from knapper.catalogue.tool_fields import AgentChatMessage, ChosenTool, ToolChoice, Tools, use_of
from knapper.catalogue.tools import AgentMessage, ToolUse
from knapper.errors import InvalidField
from knapper.wire import types
from knapper.wire.json import decode

__all__ = ["ChatRequest", "CompletionRequest", "SharedParameters", "chat", "completion", "decode"]

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; chats have none
Name = Annotated[str, Meta(min_length=1, max_length=limits.text_chars_max)]
Count = Annotated[int, Meta(ge=1, le=limits.num_samples_max)]
Seed = Annotated[int, Meta(ge=limits.seed_min, le=limits.seed_max)]
Temperature = Annotated[float, Meta(ge=0, le=limits.temperature_max)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Top = Annotated[int, Meta(ge=0, le=limits.top_logprobs_max)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]

# Unserved parameters: (values without an effect, what is allowed).
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((None, 0), "0: tokens are drawn from the model's own distribution, without penalties"),
    "frequency_penalty": ((None, 0), "0: tokens are drawn from the model's own distribution, without penalties"),
    "logit_bias": ((None, {}), "none: tokens are drawn from the model's own distribution"),
    "repetition_penalty": ((None, 1), "1: tokens are drawn from the model's own distribution, without penalties"),
    "length_penalty": ((None, 1), "1: there is no beam search"),
    "use_beam_search": ((None, False), "false: there is no beam search"),
    "min_p": ((None, 0), "0: top_k and top_p are what cuts a distribution"),
    "min_tokens": ((None, 0), "0: a text ends where the model ends it; ignore_eos goes on"),
    "skip_special_tokens": ((None, True), "true: special tokens have no text"),
    "include_stop_str_in_output": ((None, False), "false: a stop string is not part of the text"),
    "add_generation_prompt": ((None, True), "true: the assistant is asked to answer"),
    "continue_final_message": ((None, False), "false: the assistant is asked to answer"),
    "suffix": ((None, ""), "none: models are asked to continue, not to fill in"),
    "functions": ((None, []), "none: tools is their newer name"),
    "function_call": ((None, "none", "auto"), "none: tool_choice is its newer name"),
    "modalities": ((None, ["text"]), '["text"]'),
    "audio": ((None,), "none: text only"),
    "prediction": ((None,), "none"),
    "reasoning_effort": ((None, "none"), "none; some models take chat_template_kwargs instead"),
    "verbosity": (
        (None, "low", "medium", "high"),
        "low, medium or high, which are all the same here: ask for it in words",
    ),
    "store": ((None, False), "false: nothing is stored"),
    "metadata": ((None, {}), "none: nothing is stored"),
    "service_tier": ((None, "auto", "default"), "auto"),
    "best_of": ((None, 1), "1: ask for n, and choose yourself"),
}


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Refuses unknown fields."""


class StreamOptions(Strict, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # hides the lengths of chunks; not served

    def __post_init__(self) -> None:
        if self.include_obfuscation:
            raise InvalidField("stream_options.include_obfuscation", True, "false")


class SharedParameters(Strict, frozen=True, kw_only=True):
    """The parameters of both completions and chat completions. `prompt_field`: the name of the prompt."""

    prompt_field: ClassVar[str] = "prompt"

    model: Name
    n: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # labels for the caller's own use
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    repetition_penalty: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None
    min_p: Any = None
    min_tokens: Any = None
    skip_special_tokens: Any = None
    include_stop_str_in_output: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, max_tokens: int | None) -> types.SamplingParams:
        """Raises InvalidField for unserved values, and for empty or too many stop strings."""
        for name, (neutral, allowed) in _UNSERVED.items():
            value = getattr(self, name, None)
            if value not in neutral:
                raise InvalidField(name, value, allowed)
        if self.stream_options is not None and not self.stream:
            raise InvalidField("stream_options", "given", "none without stream")
        if self.top_k == 0:
            raise InvalidField("top_k", 0, "-1 (all tokens), or at least 1")
        if "" in self.stops or len(self.stops) > limits.stop_sequences_max:
            raise InvalidField("stop", self.stop, f"up to {limits.stop_sequences_max} texts, none of them empty")
        return types.SamplingParams(
            max_tokens=max_tokens,
            seed=self.seed,
            stop_strings=self.stops,
            ignore_eos=self.ignore_eos,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=-1 if self.top_k is None else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
        )


class CompletionRequest(SharedParameters, frozen=True, kw_only=True):
    """v1/completions"""

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: Top | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None

    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids. Raises InvalidField if there is none, and for too many choices."""
        items = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        ids = [item for item in items if isinstance(item, int)]
        prompts: list[str | list[int]] = [ids] if ids else [item for item in items if not isinstance(item, int)]
        if not prompts or "" in prompts or [] in prompts or 0 < len(ids) < len(items):
            raise InvalidField("prompt", self.prompt, "a text, token ids, or a list of such; none empty")
        if len(prompts) * self.choices > limits.num_samples_max:
            allowed = f"up to {limits.num_samples_max} choices in all"
            raise InvalidField("prompt: count times n", len(prompts) * self.choices, allowed)
        return prompts

    def sampling(self) -> types.SamplingParams:
        """Raises InvalidField."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidField("max_tokens", 0, "at least 1, or 0 with echo, which only scores the prompt")
        if self.stream and self.echo and self.logprobs is not None:
            allowed = "none together with echo and stream: those of the prompt come in one piece"
            raise InvalidField("logprobs", self.logprobs, allowed, "Leave out stream")
        return self.params(_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens)


class ChatRequest(SharedParameters, frozen=True, kw_only=True):
    """v1/chat/completions"""

    prompt_field = "messages"

    messages: Annotated[list[AgentChatMessage], Meta(min_length=1, max_length=limits.chat_messages_max)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] = {}
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None

    def conversation(self) -> list[AgentMessage]:
        """Raises InvalidField."""
        return [message.agent_message(f"messages[{i}]") for i, message in enumerate(self.messages)]

    def tool_use(self) -> ToolUse:
        """Raises InvalidField."""
        tools = [each.tool() for each in self.tools or ()]
        name = self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        choice = "auto" if isinstance(self.tool_choice, ChosenTool) or self.tool_choice is None else self.tool_choice
        use = use_of(tools, choice, name, self.parallel_tool_calls is not False)
        if use.forced and self.ignore_eos:
            raise InvalidField("ignore_eos", True, "false beside tool_choice, by which a text ends with its calls")
        return use

    def answer(self) -> Mapping[str, Any] | None:
        """The part of a grammar that an answer in words must follow, if any. Raises InvalidField."""
        part = None if self.response_format is None else self.response_format.part()
        if part is not None and self.ignore_eos:
            raise InvalidField("ignore_eos", True, "false beside response_format, which says where a text ends")
        return part

    def sampling(self) -> types.SamplingParams:
        """Raises InvalidField."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidField("top_logprobs", self.top_logprobs, "none without logprobs", "Set logprobs to true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidField("max_tokens", self.max_tokens, "none beside max_completion_tokens, its newer name")
        return self.params(both.pop() if both else None)


# ---- decoded in a worker process if the body is not small


def completion(body: bytes) -> tuple[CompletionRequest, types.SamplingParams, list[str | list[int]]]:
    """(request without its prompt, parameters, prompts). Raises UserError."""
    request = decode(body, CompletionRequest)
    return msgspec.structs.replace(request, prompt=""), request.sampling(), request.prompts()


def chat(body: bytes) -> tuple[ChatRequest, Chat]:
    """(request without what the chat holds, chat). Raises UserError."""
    request = decode(body, ChatRequest)
    conversation, images = chat_images.apart(request.conversation())
    asked = Chat(
        request.model,
        conversation,
        request.sampling(),
        request.tool_use(),
        request.answer(),
        request.choices,
        request.top_logprobs or 0,
        request.chat_template_kwargs,
        images,
    )
    return msgspec.structs.replace(request, messages=[], response_format=None, tools=None), asked
