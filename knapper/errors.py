"""The one tree of errors: each class knows its HTTP status, its stable code, and who is at fault.

A message says what was wrong, which value, what is allowed and what to do. `docs/errors.md` has a section for each
code.
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
    field: str | None = None  # the one that is wrong, where it is one

    def __init__(self, message: str = "") -> None:
        """Of a long message, the middle is left out: what is wrong stands first, what to do last."""
        half = limits.error_message_chars_max // 2
        super().__init__(
            message if len(message) <= limits.error_message_chars_max else f"{message[:half]} ... {message[-half:]}"
        )

    def __str__(self) -> str:
        """One line, fit for a terminal: messages quote what users sent."""
        return printable(super().__str__())

    def as_json(self) -> dict[str, str]:
        """As all our servers tell it. `detail` is what the SDK and its command line print."""
        return {"detail": str(self), "code": self.code, "category": self.category}

    def __reduce__(self) -> tuple[object, ...]:
        """Errors go from process to process, whatever their classes are made with."""
        return _made, (type(self), self.args, vars(self))


def _made(kind: type[KnapperError], args: tuple[object, ...], more: dict[str, object]) -> KnapperError:
    error = kind.__new__(kind, *args)
    vars(error).update(more)
    return error


class UserError(KnapperError):
    """The request cannot be served as it is; sending it again changes nothing."""

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
        self.field, self.value, self.allowed, self.todo = field, value, allowed, todo

    def __reduce__(self) -> tuple[object, ...]:
        """Without a value that may be as large as the request."""
        return _made, (type(self), self.args, {**vars(self), "value": _brief(self.value)})


def _brief(value: object, depth: int = 4) -> object:
    """As much of it as a message can show: the whole of a large one takes seconds to write."""
    if isinstance(value, (str, bytes)):
        return value[:120]
    if isinstance(value, (list, tuple)):
        return type(value)(_brief(each, depth - 1) for each in value[:60]) if depth else value[:0]
    if isinstance(value, dict):
        return {key: _brief(each, depth - 1) for key, each in islice(value.items(), 30 if depth else 0)}
    return value


class ContextLengthExceeded(UserError):
    """A prompt is longer than the model reads. Programs that shorten their prompts look for this code, and for these
    words.
    """

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
        """Raises it for a prompt of so many tokens. One that only is scored needs no room for a token after it."""
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
    """The request did not come in time, by the network's fault or its client's. It can be sent again."""

    code = "too_slow"
    status = 408


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


class ForeignSite(UserError):
    """The request came by a name, or from a page, that this server does not go by: a browser may have been misled."""

    code = "foreign_site"
    status = 403


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


class Unservable(Unavailable):
    """The base model cannot be loaded. Whoever asks is told why; it is tried again, and what waits then goes on."""

    code = "unservable"


class Fenced(KnapperError):
    """A newer claim owns the run. The state in memory is dropped; nothing more of it may be written."""

    code = "fenced"
    status = 503


class NotHolder(Unavailable):
    """Another process holds the run, or this one is leaving: ring that one, or the service."""

    code = "not_holder"


class Corrupt(KnapperError):
    """Stored bytes are not those that were written. Never used, never repaired in silence; an operator is needed.

    `object_name`: the damaged object, where it is one.
    """

    code = "corrupt"
    status = 503  # not now: what waits goes on once the object is restored
    object_name: str = ""


def damaged(name: str, what: str) -> Corrupt:
    """The error for a damaged object: which it is, what of it is wrong, and what to do."""
    error = Corrupt(
        f"object {name} is damaged: {what}. Nothing was made of it. Tell the server's operator, who restores it from a "
        'backup (docs/operating.md, "A damaged object")'
    )
    error.object_name = name
    return error


class Told(KnapperError):
    """An error of another process, as it told it: with the code, the status and the field that it had there."""

    def __init__(self, message: str, code: str, status: int, category: Category, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.category, self.field = code, status, category, field


# Codes of what waits for an operator: nothing that a client or a retry does ends it.
STANDING: Final = frozenset({Corrupt.code, NewerFormat.code, OtherDtype.code, Unservable.code})
