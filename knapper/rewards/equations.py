"""Equality of mathematics, by math-verify. It evaluates what it reads, so this runs in a cell only.

Of a text without LaTeX it reads the last number, and so it would take `2x+1` for 2 and `1e400` for 1. An answer is
therefore read whole or not at all, and a number with an exponent is written out for it.
"""

import re
from typing import Any

try:
    from math_verify import parse, verify
except ImportError:  # the extra `reward` is not installed
    parse = verify = None
else:
    verify(parse("$\\frac{1}{2}$"), parse("0.5"))  # it loads some of its parts late: here, once for all cells

_LATEX = ("$", "\\boxed", "\\(", "\\[")
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?)(\d+)(?!\w)")


def maths(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """1 if both are equal. What cannot be read in the completion is not the answer; in the answer it is an error."""
    if parse is None:
        return {"error": "math-verify is not installed; allowed: `pip install 'knapper[reward]'`"}
    wanted = _answer(arguments["answer"])
    if not wanted:
        return {"error": f"answer is {arguments['answer'][:80]!r}; maths allows LaTeX or a plain expression"}
    given = parse(_written_out(arguments["text"]), parsing_timeout=None)
    return {"value": float(verify(wanted, given, timeout_seconds=None))}


def _answer(text: str) -> list[Any]:
    """What the whole text says, or nothing."""
    text = _written_out(text.strip())
    found: list[Any] = parse(text, parsing_timeout=None)
    if _is_latex(text) or (found and found[-1] == text):
        return found
    whole: list[Any] = parse(f"${text}$", parsing_timeout=None)
    return whole


def _written_out(text: str) -> str:
    """`4e-5` as a product."""
    power = r"\1*10^{\2\3}" if _is_latex(text) else r"\1*10^\2\3"
    return _EXPONENT.sub(power, text)


def _is_latex(text: str) -> bool:
    return any(mark in text for mark in _LATEX)
