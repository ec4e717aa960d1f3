"""What a process lets go of before its memory is frozen or copied, and takes up again when it goes on.

Who holds a connection, a claim or memory that another can do without registers it here.
"""

from collections.abc import Awaitable, Callable

_releases: list[Callable[[], Awaitable[None]]] = []
_renewals: list[Callable[[], None]] = []


def before(release: Callable[[], Awaitable[None]]) -> None:
    """Call `release` before an image is made, the newest first: connections are closed after what uses them."""
    _releases.insert(0, release)


def after(renew: Callable[[], None]) -> None:
    """Call `renew` when the process goes on, be it itself or a copy."""
    _renewals.append(renew)


async def quiesce() -> None:
    for release in _releases:
        await release()


def resume() -> None:
    for renew in _renewals:
        renew()
