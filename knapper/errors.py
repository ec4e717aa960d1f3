"""All errors: each class has its HTTP status, its stable code, and whose fault it is.

A message names the error, the value, what is allowed and what to do. `docs/errors.md` has a section for each code.
"""

from itertools import islice
from typing import Final, Literal

from knapper import limits
from knapper.text.printable import printable

Category = Literal["user", "server"]


class KnapperError(Exception):
    """The root. Anything else that escapes is a defect of knapper."""

    code: str = "internal"
    status: int = 500
    category: Category = "server"
    field: str | None = None  # the wrong field, if it is one

    def __init__(self, message: str = "") -> None:
        """Shortens a long message in the middle: the error comes first, the remedy last."""
        half = limits.error_message_chars_max // 2
        super().__init__(
            message if len(message) <= limits.error_message_chars_max else f"{message[:half]} ... {message[-half:]}"
        )

    def __str__(self) -> str:
        """One line, fit for a terminal: messages quote what users sent."""
        return printable(super().__str__())

    def as_json(self) -> dict[str, str]:
        """The body of every server's error answer. The SDK and its command line print `detail`."""
        return {"detail": str(self), "code": self.code, "category": self.category}

    def __reduce__(self) -> tuple[object, ...]:
        """Errors are pickled between processes, whatever arguments their constructors take."""
        return _made, (type(self), self.args, vars(self))


def _made(kind: type[KnapperError], args: tuple[object, ...], more: dict[str, object]) -> KnapperError:
    error = kind.__new__(kind, *args)
    vars(error).update(more)
    return error


class UserError(KnapperError):
    """The request cannot be served as it is; repeating it changes nothing."""

    code = "invalid_request"
    status = 422
    category = "user"


class InvalidField(UserError):
    """One field has a value that is not allowed."""

    code = "invalid_field"

    def __init__(self, field: str, value: object, allowed: str, todo: str = "") -> None:
        shown = repr(_brief(value))
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field} is {shown}; allowed: {allowed}" + (f". {todo}" if todo else ""))
        self.field, self.value, self.allowed, self.todo = printable(field), value, allowed, todo

    def __reduce__(self) -> tuple[object, ...]:
        """Without a value that may be as large as the request."""
        return _made, (type(self), self.args, {**vars(self), "value": _brief(self.value)})


def _brief(value: object, depth: int = 4) -> object:
    """As much as a message can show: formatting a whole large value takes seconds."""
    if isinstance(value, (str, bytes)):
        return value[:120]
    if isinstance(value, (list, tuple)):
        return type(value)(_brief(each, depth - 1) for each in value[:60]) if depth else value[:0]
    if isinstance(value, dict):
        return {key: _brief(each, depth - 1) for key, each in islice(value.items(), 30 if depth else 0)}
    return value


class ContextLengthExceeded(UserError):
    """The prompt exceeds the model's context. Programs that shorten prompts look for this code and this wording."""

    code = "context_length_exceeded"

    def __init__(self, prompt: int, longest: int, context: int, because: str = "") -> None:
        """In tokens: the prompt's, how many it may have, and the model's context; `because`: why so few."""
        super().__init__(
            f"This model's maximum context length is {context} tokens, and the prompt is too long: it has {prompt}; "
            f"allowed: up to {longest}{because}. Shorten the prompt"
        )
        self.field = "prompt"

    @classmethod
    def check(cls, prompt: int, max_tokens: int | None, context: int) -> None:
        """Raises it for a prompt of so many tokens. A prompt that is only scored needs no position after it."""
        longest = context if max_tokens == 0 else context - 1
        if prompt > longest:
            raise cls(prompt, longest, context)


class NotFound(UserError):
    """The named object does not exist, or belongs to another tenant (both look alike on purpose)."""

    code = "not_found"
    status = 404


class TooLarge(UserError):
    """The request, or a part of it, is over a limit."""

    code = "too_large"
    status = 413


class HeadersTooLarge(UserError):
    """The request's URL and headers are over a limit."""

    code = "headers_too_large"
    status = 431


class TooSlow(UserError):
    """The request did not arrive in time, because of the network or the client. It can be repeated."""

    code = "too_slow"
    status = 408


class OutOfMemory(UserError):
    """The request alone needs more memory than the server has."""

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


class ForeignSite(UserError):
    """The request used a host name, or came from a page, that is not this server's: a browser may have been misled."""

    code = "foreign_site"
    status = 403


class InvalidToken(Unauthorized):
    """The token sent instead of the API key has expired or is not ours: exchange the key for a new one."""

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


class QuotaReached(TooMany):
    """The tenant has as much at the same time as its quota allows: more once some of it has ended."""

    code = "quota_reached"
    category = "user"


class QuotaUsedUp(Unavailable):
    """The tenant has used what its quota allows. The SDK pauses on this status, says why, and goes on by itself."""

    code = "quota_used_up"
    status = 402
    category = "user"


class StoreError(Unavailable):
    """A call to the store failed; whether it took effect is unknown unless the message says so."""

    code = "store_unavailable"


class NewerFormat(Unavailable):
    """The record was written by a newer knapper: it is intact, but this one cannot read it."""

    code = "newer_format"


class OtherDtype(Unavailable):
    """The run was made in another dtype than this engine computes in: it waits for one that computes in its own."""

    code = "other_dtype"


class WaitsForMemory(Unavailable):
    """The base model fits once the engines of others on this machine have ended. Loading is retried by itself."""


class Unservable(Unavailable):
    """The base model cannot be loaded. Every caller is told why; loading is retried, and requests wait for it."""

    code = "unservable"


class Fenced(KnapperError):
    """A newer claim owns the run. The state in memory is dropped; nothing more of it may be written."""

    code = "fenced"
    status = 503


class NotHolder(Unavailable):
    """Another process holds the run, or this one is shutting down: notify that one, or the service."""

    code = "not_holder"


class Corrupt(KnapperError):
    """Stored bytes are not those that were written. Never used, and never repaired silently; an operator is needed.

    `object_name`: the damaged object, if it is one.
    """

    code = "corrupt"
    status = 503  # not now: waiting requests continue once the object is restored
    object_name: str = ""


def damaged(name: str, what: str) -> Corrupt:
    """The error for a damaged object: its name, the damage, and the remedy."""
    error = Corrupt(
        f"object {name} is damaged: {what}. Nothing was made of it. Tell the server's operator, who restores it from a "
        'backup (docs/operating.md, "A damaged object")'
    )
    error.object_name = name
    return error


class RemoteError(KnapperError):
    """An error that another process reported, with the code, status and field it had there."""

    def __init__(self, message: str, code: str, status: int, category: Category, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.category, self.field = code, status, category, field


# Codes of errors that need an operator: neither clients nor retries end them.
STANDING: Final = frozenset({Corrupt.code, NewerFormat.code, OtherDtype.code, Unservable.code})
