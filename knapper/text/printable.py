"""Makes untrusted text safe for terminals and log lines; all output passes through here.

Terminal escape sequences, characters that change the writing direction, line breaks that forge log lines, and lone
surrogates are written as Python escapes, such as `\\x1b`.
"""

import sys
from typing import TextIO


def printable(text: str, keep: str = "") -> str:
    """The text with all unprintable characters escaped, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def say(*texts: object, file: TextIO | None = None) -> None:
    """Print the texts, one line each and all at once; commands use this instead of `print`."""
    out = file or sys.stdout
    out.write("".join(printable(str(text)) + "\n" for text in texts))
    out.flush()
