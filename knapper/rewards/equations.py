"""Equality of mathematics, by math-verify. It evaluates what it reads, so this runs in a cell only."""

from typing import Any

try:
    from math_verify import parse, verify
except ImportError:  # the extra `reward` is not installed
    parse = verify = None
else:
    verify(parse("$\\frac{1}{2}$"), parse("0.5"))  # it loads some of its parts late: here, once for all cells


def maths(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """1 if both are equal. What cannot be read in the completion is not the answer; in the answer it is an error."""
    if parse is None:
        return {"error": "math-verify is not installed; allowed: `pip install 'knapper[reward]'`"}
    wanted = parse(arguments["answer"], parsing_timeout=None) or parse(f"${arguments['answer']}$", parsing_timeout=None)
    if not wanted:
        return {"error": f"answer is {arguments['answer'][:80]!r}; maths allows LaTeX or a plain expression"}
    given = parse(arguments["text"], parsing_timeout=None)
    return {"value": float(verify(wanted, given, timeout_seconds=None))}
