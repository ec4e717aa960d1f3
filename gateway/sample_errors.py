"""Errors of samples: of the sample function's response, and of one that is too large."""

from typing import Literal

import msgspec

from knapper import limits
from knapper.errors import KnapperError, RemoteError, TooLarge


def oversized(size: int) -> TooLarge:
    """The result for a response too large to keep until its client fetches it: without one, the client would retry."""
    return TooLarge(
        f"the answer has {size} bytes; allowed: {limits.sample_results_bytes_max}. "
        f"Ask for fewer samples or alternatives at once"
    )


class _ErrorBody(msgspec.Struct):
    """An error of the sample function; all defaults for one of a proxy."""

    detail: str = ""
    code: str = KnapperError.code
    category: Literal["", "user", "server"] = ""
    field: str | None = None


def decode(status: int, content: bytes) -> RemoteError:
    """The error in a response of the sample function."""
    try:
        body = msgspec.json.decode(content, type=_ErrorBody)
    except msgspec.MsgspecError:
        body = _ErrorBody()
    category = body.category or ("user" if status < 500 else "server")
    return RemoteError(body.detail or f"the sample function answered {status}", body.code, status, category, body.field)
