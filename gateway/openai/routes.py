"""/v1, and /oai/api/v1: what OpenAI's clients ask for."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.openai import models, schemas
from gateway.openai.completions import Generation, answer
from gateway.openai.errors import spoken, unknown_path
from gateway.openai.responses import ChatShape, CompletionShape
from gateway.openai.samples import Question
from gateway.routing import Door
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper import limits
from knapper.catalogue.tokenizer import Language
from knapper.errors import ContextLengthExceeded


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": await models.listed(parts(request), tenant_of(request))})


async def get_model(request: Request) -> Response:
    name = request.path_params["name"]
    await models.choose(parts(request), tenant_of(request), name)
    return JSONResponse(models.described(name))


async def completions(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked, params, given = await bodies.computed(request, schemas.completion, body)
    chosen = await models.choose(gateway, tenant, asked.model)
    language = await gateway.openai.languages.of(chosen.model)
    read = partial(_read, language, chosen.model.context, given, echo=bool(asked.echo))
    prompts, before = await bodies.aside(request, len(body), read)
    prompt_top = asked.logprobs if asked.echo else None
    question = Question(params, asked.choices, asked.logprobs or 0, prompt_top)
    shape = CompletionShape(language, asked.logprobs, before if asked.echo else [], asked.choices)
    return await answer(request, Generation(asked, chosen, language, prompts, question, shape, before))


async def chat_completions(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked, params, messages = await bodies.computed(request, schemas.chat, body)
    chosen = await models.choose(gateway, tenant, asked.model)
    language = await gateway.openai.languages.of(chosen.model)
    more, context = asked.chat_template_kwargs, chosen.model.context
    read = partial(language.chat, messages, gateway.clock(), more, context=context)
    prompt = await bodies.aside(request, len(body), read)
    question = Question(params, asked.choices, asked.top_logprobs or 0)
    shape = ChatShape(language, (asked.top_logprobs or 0) if asked.logprobs else None)
    return await answer(request, Generation(asked, chosen, language, [prompt], question, shape, [""]))


def _read(
    language: Language, context: int, given: list[str | list[int]], *, echo: bool
) -> tuple[list[list[int]], list[str]]:
    """(the prompts' tokens, what their choices begin with)"""
    prompts = [_tokens(language, context, prompt) for prompt in given]
    return prompts, [_text(language, prompt) if echo else "" for prompt in given]


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
    for base in ("/v1", "/oai/api/v1")  # the second is where Tinker's own server has it
    for route in (
        Door(f"{base}/models", spoken(list_models), methods=["GET"], body_bytes_max=0),
        Door(f"{base}/models/{{name:path}}", spoken(get_model), methods=["GET"], body_bytes_max=0),
        Door(f"{base}/completions", spoken(completions), methods=["POST"], body_bytes_max=_TEXT),
        Door(f"{base}/chat/completions", spoken(chat_completions), methods=["POST"], body_bytes_max=_TEXT),
        Door(f"{base}/{{path:path}}", spoken(unknown_path), methods=_ANY, body_bytes_max=0),
    )
]
