"""The routes of the OpenAI protocol, under /v1 and /oai/api/v1."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.openai import chats, models, schemas
from gateway.openai.completions import Generation, respond
from gateway.openai.errors import openai_errors, unknown_path
from gateway.openai.responses import ChatFormat, CompletionFormat, ToolChatFormat
from gateway.openai.samples import SampleOptions
from gateway.routing import Door
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import limits
from knapper.catalogue.tokenizer import Language
from knapper.errors import ContextLengthExceeded


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": await models.listed(services_of(request), tenant_of(request))})


async def get_model(request: Request) -> Response:
    name = request.path_params["name"]
    await models.resolve(services_of(request), tenant_of(request), name)
    return JSONResponse(models.description(name))


async def completions(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    call, params, inputs = await bodies.in_worker(request, schemas.completion, body)
    model = await models.resolve(gateway, tenant, call.model)
    language = await gateway.openai.languages.of(model.record)
    encode = partial(_encode, language, model.record.context, inputs, echo=bool(call.echo))
    prompts, prefixes = await bodies.in_thread(request, len(body), encode)
    prompt_top = call.logprobs if call.echo else None
    options = SampleOptions(params, call.choices, call.logprobs or 0, prompt_top)
    choice_format = CompletionFormat(language, call.logprobs, prefixes if call.echo else [], call.choices)
    return await respond(request, Generation(call, model, language, prompts, options, choice_format, prefixes))


async def chat_completions(request: Request) -> Response:
    body = await bodies.read(request)
    call, chat = await bodies.in_worker(request, schemas.chat, body)
    ready = await chats.prepare(request, len(body), chat)
    calling, scores = ready.calling, (chat.top if call.logprobs else None)
    choice_format = (
        ChatFormat(calling.language, scores)
        if calling.form is None
        else ToolChatFormat(calling.language, scores, calling, services_of(request).new_id)
    )
    prompts, shown = [ready.prompt], calling.special_tokens
    generation = Generation(call, ready.model, calling.language, prompts, ready.options, choice_format, [""], shown)
    return await respond(request, generation)


def _encode(
    language: Language, context: int, inputs: list[str | list[int]], *, echo: bool
) -> tuple[list[list[int]], list[str]]:
    """(tokens of each prompt, prefix of its choices)"""
    prompts = [_tokens(language, context, prompt) for prompt in inputs]
    return prompts, [_text(language, prompt) if echo else "" for prompt in inputs]


def _tokens(language: Language, context: int, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return language.encode(prompt, context=context)
    if len(prompt) > context:
        raise ContextLengthExceeded(len(prompt), context, context)
    return prompt


def _text(language: Language, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(language.tokenizer.decode(prompt, skip_special_tokens=True))


_TEXT = limits.text_body_bytes_max
_ANY = ["GET", "POST", "PUT", "PATCH", "DELETE"]
ROUTES = [
    route
    for base in ("/v1", "/oai/api/v1")  # the second is the prefix of Tinker's own server
    for route in (
        Door(f"{base}/models", openai_errors(list_models), methods=["GET"], body_bytes_max=0),
        Door(f"{base}/models/{{name:path}}", openai_errors(get_model), methods=["GET"], body_bytes_max=0),
        Door(f"{base}/completions", openai_errors(completions), methods=["POST"], body_bytes_max=_TEXT),
        Door(f"{base}/chat/completions", openai_errors(chat_completions), methods=["POST"], body_bytes_max=_TEXT),
        Door(f"{base}/{{path:path}}", openai_errors(unknown_path), methods=_ANY, body_bytes_max=0),
    )
]
