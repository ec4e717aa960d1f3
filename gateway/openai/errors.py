"""Errors in the format of the OpenAI protocol."""

from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.tenants import tenant_of
from knapper.errors import KnapperError, NotFound, QuotaReached, QuotaUsedUp, Unavailable, Unservable, UserError

Handler = Callable[[Request], Awaitable[Response]]

log = structlog.get_logger()


def body(error: KnapperError) -> dict[str, Any]:
    """`code` is knapper's own, and stable, except for quotas; `param` names the invalid field, if any."""
    if isinstance(error, (QuotaReached, QuotaUsedUp)):
        code = "insufficient_quota" if isinstance(error, QuotaUsedUp) else "rate_limit_exceeded"
        kind = code if isinstance(error, QuotaUsedUp) else "requests"
        return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}
    kind = (
        "rate_limit_error"
        if error.status == 429
        else f"{'invalid_request' if _is_user_error(error) else 'server'}_error"
    )
    return {"error": {"message": str(error), "type": kind, "param": error.field, "code": error.code}}


def openai_errors(handler: Handler) -> Handler:
    """Wraps the handler so that its errors have OpenAI's format."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except KnapperError as error:
            if not _is_user_error(error) and not isinstance(error, Unservable):  # logged when the function reported it
                log.warning("request failed", path=request.url.path, code=error.code, reason=str(error))
            status = {UserError.status: 400, QuotaUsedUp.status: 429}.get(error.status, error.status)
            headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if isinstance(error, Unavailable) else None
            if headers and isinstance(error, (Unservable, QuotaUsedUp)):  # clients would retry in silence
                headers["x-should-retry"] = "false"
            return JSONResponse(body(error), status_code=status, headers=headers)

    return endpoint


async def unknown_path(request: Request) -> Response:
    tenant_of(request)
    served = "/v1/models, /v1/completions, /v1/chat/completions and /v1/responses"
    raise NotFound(f"{request.method} {request.url.path} is not served; of the OpenAI protocol, {served} are")


def _is_user_error(error: KnapperError) -> bool:
    return error.category == "user"
