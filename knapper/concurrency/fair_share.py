"""Fair shares of a scarce resource: the key that has used least of it is served next.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): every key has a virtual time, the cost charged to it, and
the lowest is served. A newcomer starts at the virtual time of the key served last: idle time earns no credit, and the
others' use meanwhile is no debt.

Keys are paths, such as `(tenant, sampler)`: tenants share equally, and within a tenant its samplers do.
"""

from collections.abc import Iterable, Iterator

Path = tuple[str, ...]
Rank = tuple[float, ...]


class FairShare:
    """The virtual time of every key that waits, or is ahead of one that does. Not thread-safe."""

    def __init__(self) -> None:
        self._times: dict[Path, float] = {}
        self._current: dict[Path, float] = {}  # parent -> virtual time of its child served last

    def join(self, *key: str) -> None:
        """The key waits from now on. One that waits already keeps its virtual time."""
        for path in _prefixes(key):
            self._times[path] = max(self._times.get(path, 0.0), self._current.get(path[:-1], 0.0))

    def rank(self, *key: str) -> Rank:
        """The rank of a key that joined; the lowest is served next."""
        return tuple(self._times[path] for path in _prefixes(key))

    def serve(self, *key: str) -> None:
        """The key is served: virtual time advances to it."""
        for path in _prefixes(key):
            parent = path[:-1]
            self._current[parent] = max(self._current.get(parent, 0.0), self._times[path])

    def charge(self, cost: float, *key: str) -> None:
        """Add `cost` to the key's virtual time."""
        for path in _prefixes(key):
            self._times[path] += cost

    def leave(self, waiting: Iterable[Path]) -> None:
        """Only the keys in `waiting` still wait. Others that are not ahead are dropped: they would start level anyway.

        Where no key waits, none is ahead.
        """
        paths = {path for key in waiting for path in _prefixes(key)}
        busy = {path[:-1] for path in paths}
        for path, time in list(self._times.items()):
            parent = path[:-1]
            if path not in paths and (parent not in busy or time <= self._current.get(parent, 0.0)):
                del self._times[path]
        self._current = {parent: time for parent, time in self._current.items() if parent in busy}


def _prefixes(key: Path) -> Iterator[Path]:
    return (key[:length] for length in range(1, len(key) + 1))
