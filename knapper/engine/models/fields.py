"""config.json and its fields, each checked where it is read. Loads no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knapper.errors import UserError

Raw = Mapping[str, Any]  # config.json, or an object in it


class UnsupportedModel(UserError):
    """The decoder does not compute the architecture, or an option of it."""

    code = "unsupported_model"


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None without it. Raises UserError for an unreadable file or another value."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give this user the right to read it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. Download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def size(raw: Raw, field: str, path: Path, default: int | None = None) -> int:
    """A whole number of 1 or more; `default` where the field is missing or null. Raises UnsupportedModel."""
    value = raw.get(field)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{path}: {field} is {value!r}; expected a whole number of 1 or more")
    return value


def number(raw: Raw, field: str, path: Path, default: float | None = None) -> float:
    """A number above 0; `default` where the field is missing or null. Raises UnsupportedModel."""
    value = raw.get(field)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UnsupportedModel(f"{path}: {field} is {value!r}; expected a number above 0")
    return float(value)


def optional(raw: Raw, field: str, path: Path, default: float | None) -> float | None:
    """A number above 0, or None where the field is null; `default` where it is missing. Raises UnsupportedModel."""
    value = raw.get(field, default)
    return None if value is None else number({field: value}, field, path)


def listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
