"""The routes of Anthropic's protocol, under /v1."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.anthropic import errors, schemas
from gateway.anthropic.answers import MessageEvents, MessageFormat, event
from gateway.anthropic.errors import anthropic_errors
from gateway.openai import chats, turn
from gateway.openai.completions import EventStream
from gateway.openai.turn import AssistantTurn
from gateway.routing import Door
from gateway.services import services_of
from knapper import limits
from knapper.errors import KnapperError
from knapper.web.requests import while_connected


async def messages(request: Request) -> Response:
    body = await bodies.read(request)
    chat, stream = await bodies.in_worker(request, schemas.messages, body)
    ready = await chats.prepare(request, len(body), chat)
    form = MessageFormat(chat.model, ready, services_of(request).new_id)
    if not stream:
        return JSONResponse(form.whole(await turn.whole(request, ready)))
    samples = await turn.submit(request, ready, stream=True)
    events = turn.streamed(samples, AssistantTurn(ready), _failed, MessageEvents(form))
    try:
        first = await while_connected(request, anext(events))
    except BaseException:
        samples.cancel()
        raise
    return EventStream(first, events, samples.cancel)


async def count_tokens(request: Request) -> Response:
    body = await bodies.read(request)
    chat = await bodies.in_worker(request, schemas.count, body)
    return JSONResponse({"input_tokens": len((await chats.prepare(request, len(body), chat)).prompt)})


def _failed(error: KnapperError) -> bytes:
    return event("error", error=errors.body(error)["error"])


_TEXT = limits.text_body_bytes_max
ROUTES = [
    Door("/v1/messages", anthropic_errors(messages), methods=["POST"], body_bytes_max=_TEXT),
    Door("/v1/messages/count_tokens", anthropic_errors(count_tokens), methods=["POST"], body_bytes_max=_TEXT),
]
