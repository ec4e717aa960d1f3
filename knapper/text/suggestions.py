"""Suggests the known word that was probably meant, for errors about unknown names."""

from collections.abc import Iterable

_CHARS_MAX = 200  # longer words are no typos, and comparing costs the product of both lengths


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean port?`, or nothing where no known word is near. Case, `-` and `_` make no difference."""
    import difflib  # here: the command line answers at once

    if len(word) > _CHARS_MAX:
        return ""
    words = {_folded(name): name for name in known}
    matches = difflib.get_close_matches(_folded(word), words, n=1)
    return f"Did you mean {words[matches[0]]}?" if matches else ""


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")
