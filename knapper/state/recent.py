"""Pages of names that begin with a time, newest first, at a cost that does not grow with the names there are.

A store lists in the order of names only, so a page is what lies in the last hours, or days, before it.
"""

from dataclasses import dataclass
from typing import Final

from knapper.ids import number
from knapper.store import Names, Store

_FIRST_SPAN_S: Final = 6 * 3600.0
_WIDER: Final = 64  # a window that has nothing is followed by one this many times as long
_READ_MAX: Final = 8  # times as many names as a page has are read for it, and more only of one moment
_READ_MIN: Final = 256  # however short the page is: a listing costs more than the names in it
_WINDOWS_MAX: Final = 16


@dataclass(frozen=True)
class PageStart:
    """Where a page begins: after the `skip` newest names of this microsecond, and after all later ones."""

    us: int
    skip: int = 0

    def __str__(self) -> str:
        return f"{self.us}-{self.skip}"


@dataclass(frozen=True)
class NamePage:
    """`names`: newest first. `older`: where the page after it begins, None after the last one."""

    names: Names
    older: PageStart | None


async def page(store: Store, prefix: str, size: int, start: PageStart) -> NamePage:
    """The newest `size` names `<prefix><us>...` from `start` on."""
    found = await _window(store, prefix, start.skip + size + 1, start.us + bool(start.skip))
    skipped = sum(_us(name, prefix) == start.us for name in found[: start.skip])
    kept = found[skipped : skipped + size]
    if skipped + size >= len(found):
        return NamePage(kept, None)
    last = _us(kept[-1], prefix)
    return NamePage(kept, PageStart(last, sum(_us(name, prefix) == last for name in found[: skipped + size])))


async def _window(store: Store, prefix: str, wanted: int, before_us: int) -> Names:
    """At least `wanted` names if there are so many, newest first."""
    end, most = f"{prefix}{number(before_us)}", max(_READ_MIN, _READ_MAX * wanted)
    few, many = 0.0, 0.0  # the longest span that had too few names, and the shortest that had too many to read
    span = _FIRST_SPAN_S * 1e6
    for _ in range(_WINDOWS_MAX):
        first = max(0, int(before_us - span))
        listed = await store.list(prefix, start_after=f"{prefix}{number(first)}", limit=most)
        found = [name for name in listed if name < end]
        if len(listed) == most == len(found):  # it may have more than was read
            many = span
        elif len(found) >= wanted or first == 0:
            return found[::-1]
        else:
            few = span
        if many and many < 2 * max(few, 1.0):
            break
        span = (few * many) ** 0.5 if few and many else many / _WIDER if many else span * _WIDER
    first = max(0, int(before_us - (many or before_us)))  # a moment that has many
    return [name for name in await store.list(prefix, start_after=f"{prefix}{number(first)}") if name < end][::-1]


def _us(name: str, prefix: str) -> int:
    return int(name[len(prefix) : len(prefix) + 20])
