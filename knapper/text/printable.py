"""Text of anybody, made fit for a terminal and for one line of a log: the one place that all of them go through.

Escape sequences that move a cursor or set a title, characters that turn the direction of writing, line breaks that
forge a line, halves of surrogate pairs that no encoding has: each stands there as Python writes it, `\\x1b`.
"""

import sys
from typing import TextIO


def printable(text: str, keep: str = "") -> str:
    """The text with every character that is not printable escaped, but those in `keep`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else repr(each)[1:-1] for each in text)


def say(*texts: object, file: TextIO | None = None) -> None:
    """Print the texts, a line each and all at once: what a command does in place of `print`."""
    out = file or sys.stdout
    out.write("".join(printable(str(text)) + "\n" for text in texts))
    out.flush()
