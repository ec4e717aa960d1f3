"""A chat on its way to the sampler, in whatever protocol it was asked for."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request

from gateway import bodies
from gateway.openai import models
from gateway.openai.models import SampledModel
from gateway.openai.samples import SampleOptions
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper.catalogue import chat_images
from knapper.catalogue.tool_calls import Calling
from knapper.catalogue.tools import AgentMessage, ToolUse
from knapper.wire import grammars
from knapper.wire.image_files import ImageFile
from knapper.wire.types import SamplingParams


@dataclass(frozen=True)
class Chat:
    """What is asked. `answer`: the part of a grammar that an answer in words must follow; `top`: alternatives to show.

    `variables`: further ones of the model's chat template. `images`: those of the messages, in order.
    """

    model: str
    messages: list[AgentMessage]
    params: SamplingParams
    use: ToolUse = field(default_factory=ToolUse)
    answer: Mapping[str, Any] | None = None
    choices: int = 1
    top: int = 0
    variables: Mapping[str, object] = field(default_factory=dict)
    images: tuple[ImageFile, ...] = ()


@dataclass(frozen=True)
class PreparedChat:
    """What is sampled. `prompt`: token ids, 0 where an image stands."""

    model: SampledModel
    calling: Calling
    prompt: list[int]
    options: SampleOptions


async def prepare(request: Request, body_bytes: int, chat: Chat) -> PreparedChat:
    """The prompt and its options. Raises UserError for all that can be wrong with them, before anything starts."""
    gateway, tenant = services_of(request), tenant_of(request)
    model = await models.resolve(gateway, tenant, chat.model)
    of_images = chat_images.tokens_of(model.record, chat.images)
    calling = Calling.of(await gateway.openai.languages.of(model.record), chat.use)
    grammar = await asyncio.to_thread(_grammar, calling, chat.answer)
    encode = partial(calling.prompt, chat.messages, gateway.clock(), chat.variables, model.record.context)
    prompt = await bodies.in_thread(request, body_bytes, encode)
    prompt, seen = chat_images.placed(prompt, of_images, chat.images)
    params = replace(chat.params, stop_strings=(*chat.params.stop_strings, *calling.stops))
    return PreparedChat(
        model, calling, prompt, SampleOptions(params, chat.choices, chat.top, grammar=grammar, images=seen)
    )


def _grammar(calling: Calling, answer: Mapping[str, Any] | None) -> str:
    """Raises InvalidField for a schema that is not supported."""
    grammar = calling.grammar(answer)
    if grammar:
        grammars.expect_compilable(grammar, "tools" if calling.form is not None else "response_format")
    return grammar
