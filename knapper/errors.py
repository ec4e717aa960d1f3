"""The one tree of errors: each class knows its HTTP status, its stable code, and who is at fault.

A message says what was wrong, which value, what is allowed and what to do. `docs/errors.md` has a section for each
code.
"""

from typing import ClassVar, Final, Literal

from knapper.printable import printable

Category = Literal["user", "server"]

_MESSAGE_CHARS_MAX = 2000  # messages quote names that clients made up, which may be as long as a request


class KnapperError(Exception):
    """The root. Anything else that escapes is a defect of knapper."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    category: ClassVar[Category] = "server"
    field: str | None = None  # the one that is wrong, where it is one

    def __init__(self, message: str = "") -> None:
        """Of a long message, the middle is left out: what is wrong stands first, what to do last."""
        half = _MESSAGE_CHARS_MAX // 2
        super().__init__(message if len(message) <= _MESSAGE_CHARS_MAX else f"{message[:half]} ... {message[-half:]}")

    def __str__(self) -> str:
        """One line, fit for a terminal: messages quote what users sent."""
        return printable(super().__str__())


class UserError(KnapperError):
    """The request cannot be served as it is; sending it again changes nothing."""

    code = "invalid_request"
    status = 422
    category = "user"


class InvalidField(UserError):
    """One field has a value that is not allowed."""

    code = "invalid_field"

    def __init__(self, field: str, value: object, allowed: str, todo: str = "") -> None:
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field} is {shown}; allowed: {allowed}" + (f". {todo}" if todo else ""))
        self.field, self.value, self.allowed, self.todo = field, value, allowed, todo


class NotFound(UserError):
    """The named object does not exist, or belongs to another tenant (both look alike on purpose)."""

    code = "not_found"
    status = 404


class TooLarge(UserError):
    """The request, or a part of it, is over a limit."""

    code = "too_large"
    status = 413


class OutOfMemory(UserError):
    """What the request needs at once does not fit into the memory that the server has, even by itself."""

    code = "out_of_memory"
    status = 413


class Gone(UserError):
    """The promise is lost: the client sends the request again (samples) or starts anew (a finished session)."""

    code = "gone"
    status = 410


class Unauthorized(UserError):
    """The API key is missing or not of a known form."""

    code = "unauthorized"
    status = 401


class InvalidToken(Unauthorized):
    """The token in the place of the API key has expired, or is not ours: exchange the key for another."""

    code = "invalid_token"


class Unavailable(KnapperError):
    """Not now: try again after `retry_after_s` seconds."""

    code = "unavailable"
    status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooMany(Unavailable):
    """A queue is full: clients back off and send again."""

    code = "too_many"
    status = 429


class StoreError(Unavailable):
    """The store did not do what it was asked; whether it happened is unknown unless the message says so."""

    code = "store_unavailable"


class NewerFormat(Unavailable):
    """The record was written by a newer knapper: nothing is wrong with it, and this one cannot read it."""

    code = "newer_format"


class OtherDtype(Unavailable):
    """The run was made in another dtype than this engine computes in: it waits for one that computes in its own."""

    code = "other_dtype"


class Fenced(KnapperError):
    """A newer claim owns the run. The state in memory is dropped; nothing more of it may be written."""

    code = "fenced"
    status = 503


class NotHolder(Unavailable):
    """Another process holds the run, or this one is leaving: ring that one, or the service."""

    code = "not_holder"


class Corrupt(KnapperError):
    """Stored bytes are not what their index says. Never used, never repaired in silence."""

    code = "corrupt"


# Codes of what waits for an operator: nothing that a client or a retry does ends it.
STANDING: Final = frozenset({Corrupt.code, NewerFormat.code, OtherDtype.code})
