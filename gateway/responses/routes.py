"""The route of the Responses protocol, under /v1 and /oai/api/v1."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.openai import chats, errors, turn
from gateway.openai.completions import EventStream
from gateway.openai.errors import openai_errors
from gateway.openai.turn import AssistantTurn
from gateway.responses import schemas
from gateway.responses.answers import ItemEvents, ItemFormat
from gateway.routing import Door
from gateway.services import services_of
from knapper import limits
from knapper.errors import KnapperError
from knapper.web.requests import while_connected

_FIELDS = {"prompt": "input", "grammar": "text.format", "response_format": "text.format", "messages": "input"}


async def responses(request: Request) -> Response:
    body = await bodies.read(request)
    chat, asked = await bodies.in_worker(request, schemas.responses, body)
    try:
        ready = await chats.prepare(request, len(body), chat)
        form = ItemFormat(asked.echoed, ready, services_of(request))
        if not asked.stream:
            return JSONResponse(form.whole(await turn.whole(request, ready)))
        samples = await turn.submit(request, ready, stream=True)
        write = ItemEvents(form)
        events = turn.streamed(samples, AssistantTurn(ready), lambda error: write.failed(_told(error)), write)
        try:
            first = await while_connected(request, anext(events))
        except BaseException:
            samples.cancel()
            raise
        return EventStream(first, events, samples.cancel)
    except KnapperError as error:
        error.field = _client_field(error)
        raise


def _told(error: KnapperError) -> dict[str, object]:
    error.field = _client_field(error)
    told: dict[str, object] = errors.body(error)["error"]
    return told


def _client_field(error: KnapperError) -> str | None:
    """The client's name for a field of a sample request."""
    field = error.field and error.field.removeprefix("sampling_params.")
    return field and _FIELDS.get(field, field)


ROUTES = [
    Door(f"{base}/responses", openai_errors(responses), methods=["POST"], body_bytes_max=limits.text_body_bytes_max)
    for base in ("/v1", "/oai/api/v1")
]
