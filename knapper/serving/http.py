"""HTTP of the functions: authenticated bodies, errors that Knative understands, frames, callers that hang up."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from knapper.errors import InvalidField, KnapperError, Unavailable, UserError
from knapper.events.cloudevents import Frame, encode_frame
from knapper.events.function_key import FunctionKey
from knapper.web import requests

T = TypeVar("T")
log = structlog.get_logger()


async def authenticated_body(request: Request, key: FunctionKey) -> bytes:
    """The body of a caller with the function key. Raises Unauthorized for any other, and TooLarge."""
    return await key.admit(request.headers, partial(requests.body, request))


def error(error: KnapperError) -> Response:
    """4xx: a poison message, do not retry. 500: a defect. 503: retry later. Never 409, and never an empty body."""
    status = error.status if isinstance(error, UserError) or error.code == KnapperError.code else 503
    after_s = error.retry_after_s if isinstance(error, Unavailable) else 1.0
    headers = {} if status != 503 else {"Retry-After": str(max(1, round(after_s)))}
    body = error.as_json()
    if error.field is not None:
        body["field"] = error.field
    return JSONResponse(body, status_code=status, headers=headers)


def durable() -> Response:
    """The work is in the store. Without a body, which a broker would take for an event, and deliver this one again."""
    return Response(status_code=204)


async def stream(first: Frame, frames: AsyncIterator[Frame]) -> AsyncIterator[bytes]:
    """The frames as bytes, each at once. An error ends the stream early: the frames before it are durable."""
    yield encode_frame(first)
    with suppress(KnapperError):
        async for frame in frames:
            yield encode_frame(frame)


def expect_model(requested: str, served: str, directory: str) -> None:
    """Raises InvalidField if the request is for another base model than this process serves."""
    if requested not in (served, directory):
        raise InvalidField("base_model", requested, repr(served))


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the caller hangs up. A defect is logged, and becomes a 500."""
    try:
        return await requests.while_connected(request, work)
    except ClientDisconnect:
        raise Unavailable("the caller hung up") from None
    except KnapperError:
        raise
    except Exception as defect:
        log.exception("defect")
        raise KnapperError(f"a defect of the server: {defect!r}") from defect
