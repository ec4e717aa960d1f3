"""JSON of no fixed shape, as tools' schemas and the arguments of calls are: bounded in how deep it goes.

Whatever handles such a value by recursion (encoders, pickle, templates) can do so, however deep the stack is by then.
"""

import json
import math
from collections.abc import Iterable
from typing import Any, Final, NoReturn

from knapper import limits
from knapper.errors import InvalidField

_BEYOND: Final = 10**309  # what every parser reads as infinity, if its numbers are doubles


class NotJson(ValueError):
    """The text is no JSON that can be written as such again."""


def of_text(text: str) -> Any:
    """The value of a text that a client or a model wrote; models break lines inside of texts.

    A number that no double holds is an integer, so that it is JSON when it is written again. Raises NotJson, also for
    what Python's parser takes and JSON cannot hold (NaN, halves of surrogate pairs), and for what is nested too deeply.
    """
    try:
        value = json.loads(text, strict=False, parse_float=_number, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()
    except MemoryError:
        raise
    except Exception as error:  # any error, as in knapper.wire.untrusted
        raise NotJson(str(error)) from error
    if (levels := nesting(value)) > limits.json_nesting_max:
        raise NotJson(f"it has {levels} levels; allowed: up to {limits.json_nesting_max}")
    return value


def _number(written: str) -> float | int:
    number = float(written)
    return number if math.isfinite(number) else _BEYOND if number > 0 else -_BEYOND


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def to_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def expect_shallow(value: Any, field: str, todo: str = "") -> int:
    """Its levels of lists and objects. Raises InvalidField for too many."""
    if (levels := nesting(value)) > limits.json_nesting_max:
        raise InvalidField(f"{field}: nesting", levels, f"up to {limits.json_nesting_max} levels", todo)
    return levels


def nesting(value: Any) -> int:
    """Levels of lists and objects. Without recursion, as nothing bounds them yet; and level by level: a stack takes
    eight times as long for many empty lists, while others wait.
    """
    levels, found = 0, [value]
    while inner := [each for each in found if isinstance(each, (dict, list))]:
        levels += 1
        found = [each for of_one in inner for each in inside(of_one)]
    return levels


def inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
