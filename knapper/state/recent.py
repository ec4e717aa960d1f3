"""Pages of names that begin with a time, newest first, at a cost that does not grow with the names there are.

A store lists in the order of names only, so a page is what lies in the last hours, or days, before it.
"""

from dataclasses import dataclass
from typing import Final

from knapper.ids import number
from knapper.store import Names, Store

_FIRST_SPAN_S: Final = 6 * 3600.0
_WIDER: Final = 64  # a window that has nothing is followed by one this many times as long
_READ_MAX: Final = 8  # times as many names as a page has are read for it, and one listing more if they are too few
_NARROWER_MAX: Final = 16


@dataclass(frozen=True)
class NamePage:
    """`names`: newest first. `older`: the cursor of the page after it, 0 on the last one."""

    names: Names
    older: int


async def page(store: Store, prefix: str, size: int, before_us: int) -> NamePage:
    """The newest names `<prefix><us>...` of earlier than `before_us`, `size` or, of one moment, a few more."""
    found = await _window(store, prefix, size + 1, before_us)
    kept = found[:size]
    while kept and len(kept) < len(found) and _us(found[len(kept)], prefix) == _us(kept[-1], prefix):
        kept.append(found[len(kept)])
    return NamePage(kept, _us(kept[-1], prefix) if len(kept) < len(found) else 0)


async def _window(store: Store, prefix: str, wanted: int, before_us: int) -> Names:
    """At least `wanted` names if there are so many, newest first."""
    end, most = f"{prefix}{number(before_us)}", _READ_MAX * wanted
    few, many = 0.0, 0.0  # the longest span that had too few names, and the shortest that had too many to read
    span = _FIRST_SPAN_S * 1e6
    for _ in range(_NARROWER_MAX):
        first = max(0, int(before_us - span))
        listed = await store.list(prefix, start_after=f"{prefix}{number(first)}", limit=most)
        found = [name for name in listed if name < end]
        if len(listed) == most == len(found):  # it may have more than was read
            many = span
        elif len(found) >= wanted or first == 0:
            return found[::-1]
        else:
            few = span
        span = (few * many) ** 0.5 if few and many else many / _WIDER if many else span * _WIDER
    return [name for name in await store.list(prefix) if name < end][::-1]


def _us(name: str, prefix: str) -> int:
    return int(name[len(prefix) : len(prefix) + 20])
