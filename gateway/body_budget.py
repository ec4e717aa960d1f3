"""The memory for request bodies: a share of what this process may use, and at most half of it for one tenant.

A body is charged while it is received and decompressed, and released when its request is answered. Small bodies are
free: there are at most as many as connections, and they should pass while large ones must wait.
"""

import os
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import Final

from knapper import limits
from knapper.errors import TooMany

_SHARE: Final = 8  # one eighth of the process's memory: a body may exist three times for a moment
_CGROUPS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Budget:
    """`total`: bytes. Thread-safe, since bodies are decompressed in threads."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: Counter[str] = Counter()
        self._lock = Lock()

    @property
    def taken(self) -> int:
        return self._taken.total()

    def take(self, tenant: str, size: int) -> None:
        """Raises TooMany if the tenant, or all tenants together, would exceed their limit."""
        with self._lock:
            if self._taken[tenant] + size > self.total // 2 or self._taken.total() + size > self.total:
                raise TooMany(
                    f"the bodies of requests under way take {self._taken.total()} bytes, {self._taken[tenant]} of them "
                    f"yours; allowed: {self.total} in all, and half of that for one tenant; send it again later"
                )
            self._taken[tenant] += size

    def release(self, tenant: str, size: int) -> None:
        with self._lock:
            self._taken[tenant] -= size
            if not self._taken[tenant]:
                del self._taken[tenant]


class Hold:
    """The memory that one request has taken."""

    def __init__(self) -> None:
        self._budget: Budget | None = None
        self._tenant = ""
        self._size = self._charged = 0

    def open(self, budget: Budget, tenant: str) -> None:
        self._budget, self._tenant = budget, tenant

    def take(self, size: int) -> None:
        """Take `size` more bytes. Raises TooMany."""
        assert self._budget is not None, "opened before anything is read"
        self._size += size
        if self._size > limits.body_free_bytes:
            self._budget.take(self._tenant, self._size - self._charged)
            self._charged = self._size

    def release(self) -> None:
        if self._budget is not None and self._charged:
            self._budget.release(self._tenant, self._charged)
        self._size = self._charged = 0


def budget() -> Budget:
    """For this process: by its container's limit, else the machine's memory; at least four of the largest bodies."""
    return Budget(max(_memory_bytes() // _SHARE, 4 * limits.body_bytes_max))


def _memory_bytes() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUPS:
        limit = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if limit.isdecimal():
            return min(int(limit), machine)
    return machine
