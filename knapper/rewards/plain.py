"""Rewards that are computed at once, in time linear in the text: no process is started for them."""

import re

from knapper.errors import UserError
from knapper.rewards.spec import ExactMatch, Format, Length, Numeric, Textual

# Each alternative is decided by its first character, so that a match costs its own length.
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?")
_FENCE = "```"


def part(term: Textual, completion: str) -> str | None:
    """What the term looks at, or None where the completion does not have it."""
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
    wanted = str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer
    if not isinstance(wanted, str):
        raise UserError(f"answer is {answer!r:.80}; exact_match allows a text or a number")
    given = part(term, completion)
    if given is None:
        return 0.0
    if term.ignore_case:
        given, wanted = given.casefold(), wanted.casefold()
    return float(given.strip() == wanted.strip())


def numeric(term: Numeric, completion: str, answer: object) -> float:
    wanted = _number(str(answer)) if isinstance(answer, int | float | str) and not isinstance(answer, bool) else None
    if wanted is None:
        raise UserError(f"answer is {answer!r:.80}; numeric allows a number, or a text that ends with one")
    given = _number(part(term, completion) or "")
    if given is None:
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


def _number(text: str) -> float | None:
    """The last number, or None."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007  the last one is meant
        pass
    return float(found[0].replace(",", "")) if found else None


def _code_block(text: str) -> str:
    """The last fenced block without its fence and language; the whole text where there is none."""
    parts = text.split(_FENCE)
    if len(parts) == 1:
        return text
    last = parts[-2] if len(parts) % 2 else parts[-1]  # an odd number of fences: the last is not closed
    return last.partition("\n")[2] if "\n" in last else last
