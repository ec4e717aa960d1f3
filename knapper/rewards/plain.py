"""Rewards that are computed at once, in time linear in the text: no process is started for them."""

import math
import re

from knapper.errors import UserError
from knapper.rewards.spec import ExactMatch, Format, Length, Maths, Numeric, PythonTests, Sql, Term, Textual

# Each alternative is decided by its first character, so that a match costs its own length.
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = "```"


def part(term: Textual, completion: str) -> str | None:
    """The part of the completion that the term judges, or None if there is none."""
    text = completion
    if term.between is not None:
        before, after = term.between
        _, found, text = text.rpartition(before)
        if not found:
            return None
        if after:
            text, found, _ = text.partition(after)
            if not found:
                return None
    if term.take == "last_line":
        lines = text.strip().splitlines()
        return lines[-1] if lines else None
    return _code_block(text) if term.take == "code_block" else text


def exact_match(term: ExactMatch, completion: str, answer: object) -> float:
    wanted = _text(answer)
    given = part(term, completion)
    if given is None:
        return 0.0
    if term.ignore_case:
        given, wanted = given.casefold(), wanted.casefold()
    return float(given.strip() == wanted.strip())


def numeric(term: Numeric, completion: str, answer: object) -> float:
    wanted = _finite(answer)
    given = _number(part(term, completion) or "")
    if given is None or not math.isfinite(given):
        return 0.0
    return float(abs(given - wanted) <= max(term.absolute, term.relative * abs(wanted)))


def length(term: Length, completion: str) -> float:
    units = len(completion) if term.unit == "characters" else len(completion.split())
    outside = max(term.min - units, units - term.max, 0)
    return max(0.0, 1.0 - outside / term.slope) if term.slope else float(outside == 0)


def format(term: Format, completion: str) -> float:  # noqa: A001  the reward's name
    rest = completion
    for tag in term.tags:
        before, opened, rest = rest.partition(f"<{tag}>")
        inner, closed, rest = rest.partition(f"</{tag}>")
        if before.strip() or not opened or not closed or f"<{tag}>" in inner:
            return 0.0
    return float(not rest.strip())


def check(term: Term, answer: object) -> None:
    """Raises UserError for an answer that the term cannot use, as far as that can be checked at once."""
    match term:
        case ExactMatch():
            _text(answer)
        case Numeric():
            _finite(answer)
        case Maths() if not isinstance(answer, str) and not _is_number(answer):
            raise UserError(f"answer is {answer!r:.80}; maths allows a text or a number")
        case Sql() if not isinstance(answer, str) and not _is_list(answer, list):
            raise UserError(f"answer is {answer!r:.80}; sql allows a query, or a list of rows")
        case PythonTests() if not isinstance(answer, str) and not (answer and _is_list(answer, str)):
            raise UserError(
                f"answer is {answer!r:.80}; python_tests allows Python with asserts, or a list of such texts"
            )


def _is_number(answer: object) -> bool:
    return isinstance(answer, int | float) and not isinstance(answer, bool)


def _is_list(answer: object, kind: type) -> bool:
    return isinstance(answer, list) and all(isinstance(each, kind) for each in answer)


def _text(answer: object) -> str:
    """Raises UserError."""
    wanted = str(answer) if _is_number(answer) else answer
    if not isinstance(wanted, str):
        raise UserError(f"answer is {answer!r:.80}; exact_match allows a text or a number")
    return wanted


def _finite(answer: object) -> float:
    """Raises UserError. Beside infinity every number is within the relative tolerance."""
    wanted = _number(str(answer)) if isinstance(answer, str) or _is_number(answer) else None
    if wanted is None or not math.isfinite(wanted):
        raise UserError(
            f"answer is {answer!r:.80}; numeric allows a number, or a text that ends with one, of at most 1.8e308"
        )
    return wanted


def _number(text: str) -> float | None:
    """The last number, or None."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007  the last one counts
        pass
    return float(match[0].replace(",", "")) if match else None


def _code_block(text: str) -> str:
    """The last fenced block without its fence and language; the whole text where there is none."""
    parts = text.split(_FENCE)
    if len(parts) == 1:
        return text
    last = parts[-2] if len(parts) % 2 else parts[-1]  # an odd number of fences: the last is not closed
    return last.partition("\n")[2] if "\n" in last else last
