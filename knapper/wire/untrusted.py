"""The border at which bytes of somebody else are parsed: whatever a parser raises there is the sender's fault.

A list of exceptions is never whole: parsers raise RecursionError, UnicodeError, OverflowError, KeyError as it happens,
and each that a list forgets is a 500, or ends a loop that serves everybody.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from knapper.errors import KnapperError


@contextmanager
def parsing(wrong: Callable[[Exception], KnapperError]) -> Iterator[None]:
    """Around the call of a parser, and nothing else. Raises `wrong(error)` for all that it raises but our own errors.

    MemoryError is the machine's.
    """
    try:
        yield
    except (KnapperError, MemoryError):
        raise
    except Exception as error:
        raise wrong(error) from error
