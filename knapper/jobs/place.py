"""What every part of a job works with: where state lies, where people look, who is rung, what time it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from knapper.jobs.bells import Bells
from knapper.store import Store


class Blob(Protocol):
    @property
    def data(self) -> bytes: ...

    @property
    def generation(self) -> str: ...


class Exchange(Protocol):
    """What a job needs of `knapper.exchange`."""

    async def read(self, name: str, bytes_max: int) -> Blob | None: ...

    async def publish(self, name: str, data: bytes) -> None: ...

    async def remove(self, name: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """`clock`: seconds since the epoch."""

    store: Store
    exchange: Exchange
    bells: Bells
    clock: Callable[[], float]
