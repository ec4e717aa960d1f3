"""What the functions' pages share: bounded bodies, errors that Knative understands, frames, callers who hang up."""

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


async def admitted(request: Request, key: FunctionKey) -> bytes:
    """The body of a caller that may call. Raises Unauthorized for any other, and TooLarge."""
    return await key.admit(request.headers, partial(requests.body, request))


def error(error: KnapperError) -> Response:
    """2xx: durable. 4xx: poison, do not repeat. 500: a defect. 503: not now. Never 409, and never an empty body."""
    status = error.status if isinstance(error, UserError) or error.code == KnapperError.code else 503
    after_s = error.retry_after_s if isinstance(error, Unavailable) else 1.0
    headers = {} if status != 503 else {"Retry-After": str(max(1, round(after_s)))}
    told = error.as_json()
    if error.field is not None:
        told["field"] = error.field
    return JSONResponse(told, status_code=status, headers=headers)


def durable() -> Response:
    """The work is in the store. Empty, or a Broker takes the body for an event, and delivers this one again."""
    return Response(status_code=204)


async def stream(first: Frame, frames: AsyncIterator[Frame]) -> AsyncIterator[bytes]:
    """The frames as bytes, each at once. An error ends the stream early: what it said is durable all the same."""
    yield encode_frame(first)
    with suppress(KnapperError):
        async for frame in frames:
            yield encode_frame(frame)


def expect_model(asked: str, served: str, directory: str) -> None:
    """Raises InvalidField if the request is for another base model than this process has."""
    if asked not in (served, directory):
        raise InvalidField("base_model", asked, repr(served))


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What the work returns. When the caller hangs up, it is cancelled. Its defects are logged, and become 503."""
    try:
        return await requests.while_connected(request, work)
    except ClientDisconnect:
        raise Unavailable("the caller hung up") from None
    except KnapperError:
        raise
    except Exception as defect:
        log.exception("defect")
        raise KnapperError(f"a defect of the server: {defect!r}") from defect
