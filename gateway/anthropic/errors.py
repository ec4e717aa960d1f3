"""Errors in the format of Anthropic's protocol."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from knapper.errors import ContextLengthExceeded, KnapperError, QuotaUsedUp, Unavailable, Unservable, UserError

_KINDS: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_FIELDS: Final = {
    "prompt": "messages", "grammar": "tools", "response_format": "output_config.format", "stop": "stop_sequences",
}  # fmt: skip
log = structlog.get_logger()


def body(error: KnapperError) -> dict[str, Any]:
    """`code` and `param` are additions: knapper's own code, and the invalid field, if any."""
    message = str(error)
    if isinstance(error, ContextLengthExceeded):  # by these words agents know that they have to shorten it
        message = f"prompt is too long: {message}"
    kind = _KINDS.get(status_of(error), "invalid_request_error" if error.category == "user" else "api_error")
    field = error.field and error.field.removeprefix("sampling_params.")
    return {
        "type": "error",
        "error": {"type": kind, "message": message, "code": error.code, "param": field and _FIELDS.get(field, field)},
    }


def status_of(error: KnapperError) -> int:
    return {UserError.status: 400, QuotaUsedUp.status: 429}.get(error.status, error.status)


def anthropic_errors(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Wraps the handler so that its errors have Anthropic's format."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except KnapperError as error:
            if error.category != "user" and not isinstance(error, Unservable):
                log.warning("request failed", path=request.url.path, code=error.code, reason=str(error))
            headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if isinstance(error, Unavailable) else None
            if headers and isinstance(error, (Unservable, QuotaUsedUp)):  # clients would retry in silence
                headers["x-should-retry"] = "false"
            return JSONResponse(body(error), status_code=status_of(error), headers=headers)

    return endpoint
