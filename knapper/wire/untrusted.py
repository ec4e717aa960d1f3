"""Parsing of untrusted bytes: any exception of a parser is the sender's fault.

A list of exceptions is never complete: parsers raise RecursionError, UnicodeError, OverflowError, KeyError, and each
that a list lacks becomes a 500, or ends a loop that serves all clients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from knapper.errors import KnapperError


@contextmanager
def parsing(wrong: Callable[[Exception], KnapperError]) -> Iterator[None]:
    """A context for the call of a parser alone. Raises `wrong(error)` for its exceptions, except knapper's own errors
    and MemoryError, which is not the sender's fault.
    """
    try:
        yield
    except (KnapperError, MemoryError):
        raise
    except Exception as error:
        raise wrong(error) from error
