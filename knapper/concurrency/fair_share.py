"""Fair shares of something scarce: whoever has been served least, in the unit that is scarce, is next.

Fair queueing by virtual time, as start-time fair queueing has it (Goyal, Vin and Cheng, SIGCOMM 1996): every key has a
virtual time, the cost that it was charged, and the lowest is served. A newcomer starts at the virtual time of whoever
was served last: idle time earns no credit, and what others used meanwhile is not held against it.

Keys are paths, as `(tenant, sampler)`: tenants share equally, and within a tenant its samplers do.
"""

from collections.abc import Iterable, Iterator

Path = tuple[str, ...]
Rank = tuple[float, ...]


class FairShare:
    """The virtual time of every key that waits, or is ahead of those that do. Of one thread, or under a lock."""

    def __init__(self) -> None:
        self._times: dict[Path, float] = {}
        self._current: dict[Path, float] = {}  # by parent: the virtual time of its child that was served last

    def join(self, *key: str) -> None:
        """The key wants to be served from now on. One that waits already stays where it is."""
        for path in _prefixes(key):
            self._times[path] = max(self._times.get(path, 0.0), self._current.get(path[:-1], 0.0))

    def rank(self, *key: str) -> Rank:
        """Of a key that joined. The lowest is next."""
        return tuple(self._times[path] for path in _prefixes(key))

    def serve(self, *key: str) -> None:
        """The key is the one that is next: virtual time reaches it."""
        for path in _prefixes(key):
            parent = path[:-1]
            self._current[parent] = max(self._current.get(parent, 0.0), self._times[path])

    def charge(self, cost: float, *key: str) -> None:
        """The key used so much."""
        for path in _prefixes(key):
            self._times[path] += cost

    def leave(self, waiting: Iterable[Path]) -> None:
        """Only these keys wait any longer. Whoever else is not ahead is forgotten: it would come back level anyway.

        Where nobody waits, nobody is ahead.
        """
        kept = {path for key in waiting for path in _prefixes(key)}
        busy = {path[:-1] for path in kept}
        for path, time in list(self._times.items()):
            parent = path[:-1]
            if path not in kept and (parent not in busy or time <= self._current.get(parent, 0.0)):
                del self._times[path]
        self._current = {parent: time for parent, time in self._current.items() if parent in busy}


def _prefixes(key: Path) -> Iterator[Path]:
    return (key[:length] for length in range(1, len(key) + 1))
