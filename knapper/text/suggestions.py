"""The known word that somebody most likely meant: what every error about an unknown name ends with."""

from collections.abc import Iterable

_CHARS_MAX = 200  # longer words are no slips, and comparing takes the product of both lengths


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean port?`, or nothing where no known word is near. Case, `-` and `_` make no difference."""
    import difflib  # here: the command line answers at once

    if len(word) > _CHARS_MAX:
        return ""
    words = {_folded(each): each for each in known}
    found = difflib.get_close_matches(_folded(word), words, n=1)
    return f"Did you mean {words[found[0]]}?" if found else ""


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")
