"""Numbers as people write them: 10M tokens, 50GiB."""

import re
from decimal import Decimal
from typing import Final

COUNTS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BYTES: Final = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    "TiB": 2**40,
}  # fmt: skip
_QUANTITY: Final = re.compile(r"([0-9]{1,24}(?:\.[0-9]{1,24})?) ?([A-Za-z]{0,3})")


def whole(text: str, units: dict[str, int]) -> int | None:
    """The number, or None if the text is none, or not a whole one."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or (unit := _unit(match[2], units)) is None:
        return None
    number = Decimal(match[1]) * unit
    return int(number) if number == int(number) else None


def _unit(name: str, units: dict[str, int]) -> int | None:
    """Of capitals only those matter that tell units apart: 10m and 10K are as good as 10M and 10k."""
    return next((size for unit, size in units.items() if unit.lower() == name.lower()), None)
