"""Errors as clients see them: one JSON schema, never a 409, never an empty body."""

from collections.abc import Awaitable, Callable

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from knapper.errors import (
    STANDING,
    Corrupt,
    InvalidToken,
    KnapperError,
    QuotaReached,
    QuotaUsedUp,
    StoreError,
    Unavailable,
    UserError,
)
from knapper.text.printable import printable

_OPERATOR_S = 30.0  # retry interval for an error that only an operator can end

log = structlog.get_logger()


def failure(error: KnapperError) -> dict[str, str]:
    """The error as the result of a future."""
    return {"error": str(error), "category": error.category}


def notice(text: str) -> dict[str, str]:
    """Headers that make the SDK print `text` in the user's terminal, whatever the status."""
    printable = text.encode("ascii", "replace").decode().replace("\n", " ")
    return {"x-deprecation-note": printable[:1000], "x-deprecation-level": "warning"}


async def known_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KnapperError), "registered for this class"
    if not isinstance(error, (UserError, QuotaReached, QuotaUsedUp)):
        log.warning("request failed", path=request.url.path, code=error.code, reason=str(error))
    headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if isinstance(error, Unavailable) else {}
    if isinstance(error, Corrupt):
        headers["Retry-After"] = f"{_OPERATOR_S:.0f}"
    if isinstance(error, InvalidToken):  # on this, and on no other 401, the SDK exchanges its key anew
        headers |= {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    # The SDK's inner layer would retry these for a minute without telling the user.
    if isinstance(error, (StoreError, QuotaReached)) or error.code in STANDING:
        headers |= {"x-should-retry": "false", **notice(str(error))}
    return JSONResponse(error.as_json(), status_code=error.status, headers=headers)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this class"
    path = printable(request.url.path)
    detail = f"{request.method} {path}: {error.detail}; this server speaks the Tinker protocol of SDK 0.38"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return JSONResponse(
        {"detail": detail, "code": code, "category": "user"}, status_code=error.status_code, headers=error.headers
    )


async def client_disconnected(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"detail": "the client went away", "code": "disconnected", "category": "user"}, status_code=499)


def unknown_error(new_id: Callable[[], str]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """A defect: the traceback stays in the log, under an id that the client receives."""

    async def handler(request: Request, error: Exception) -> Response:
        incident = new_id()[:12]
        log.error("defect", incident=incident, path=request.url.path, exc_info=error)
        detail = (
            f"the server failed in a way it should not; the operator finds incident {incident} in the gateway's log"
        )
        return JSONResponse({"detail": detail, "code": "internal", "category": "server"}, status_code=500)

    return handler
