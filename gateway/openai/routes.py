"""/v1, and /oai/api/v1: what OpenAI's clients ask for."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway import bodies
from gateway.openai import forms, models
from gateway.openai.answering import Task, answer
from gateway.openai.asking import Question
from gateway.openai.errors import spoken, unknown_path
from gateway.openai.shapes import ChatShape, CompletionShape
from gateway.parts import parts
from gateway.tenants import tenant_of
from knapper.language import Language


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": await models.listed(parts(request), tenant_of(request))})


async def get_model(request: Request) -> Response:
    name = request.path_params["name"]
    await models.choose(parts(request), tenant_of(request), name)
    return JSONResponse(models.described(name))


async def completions(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked = await asyncio.to_thread(forms.decode, body, forms.Completion)
    params, given = asked.sampling(), asked.prompts()
    chosen = await models.choose(gateway, tenant, asked.model)
    language = await gateway.openai.languages.of(chosen.model)
    prompts = await asyncio.to_thread(lambda: [_tokens(language, prompt) for prompt in given])
    before = [_text(language, prompt) if asked.echo else "" for prompt in given]
    prompt_top = asked.logprobs if asked.echo else None
    question = Question(params, asked.choices, asked.logprobs or 0, prompt_top)
    shape = CompletionShape(language, asked.logprobs, before if asked.echo else [], asked.choices)
    return await answer(request, Task(asked, chosen, language, prompts, question, shape, before))


async def chat_completions(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked = await asyncio.to_thread(forms.decode, body, forms.Chat)
    params, messages = asked.sampling(), asked.conversation()
    chosen = await models.choose(gateway, tenant, asked.model)
    language = await gateway.openai.languages.of(chosen.model)
    prompt = await asyncio.to_thread(language.chat, messages, gateway.clock(), asked.chat_template_kwargs)
    question = Question(params, asked.choices, asked.top_logprobs or 0)
    shape = ChatShape(language, (asked.top_logprobs or 0) if asked.logprobs else None)
    return await answer(request, Task(asked, chosen, language, [prompt], question, shape, [""]))


def _tokens(language: Language, prompt: str | list[int]) -> list[int]:
    return language.encode(prompt) if isinstance(prompt, str) else prompt


def _text(language: Language, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(language.tokenizer.decode(prompt, skip_special_tokens=True))


ROUTES = [
    route
    for base in ("/v1", "/oai/api/v1")  # the second is where Tinker's own server has it
    for route in (
        Route(f"{base}/models", spoken(list_models), methods=["GET"]),
        Route(f"{base}/models/{{name:path}}", spoken(get_model), methods=["GET"]),
        Route(f"{base}/completions", spoken(completions), methods=["POST"]),
        Route(f"{base}/chat/completions", spoken(chat_completions), methods=["POST"]),
        Route(f"{base}/{{path:path}}", spoken(unknown_path), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    )
]
