"""The name of this process among all others, and whether its memory has gone on elsewhere since it took that name."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex  # noqa: TID251 - from the kernel: two copies of one memory draw different ones
from typing import Final

_CLOCK_STEP_S: Final = 30.0  # by more no wall clock is set; an image that goes on later has slept
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class ProcessIdentity:
    """`clock`: seconds since the epoch. `now`: monotonic seconds, which stand still in an image. `place`: the host."""

    def __init__(
        self, clock: Callable[[], float], now: Callable[[], float], place: Callable[[], str] | None = None
    ) -> None:
        self._clock, self._now, self._place_now = clock, now, place or _place
        self.renew()

    @property
    def name(self) -> str:
        return self._name

    def renew(self) -> str:
        """Take another name, and return it."""
        self._place, self._offset_s = self._place_now(), self._clock() - self._now()
        self._name = f"{socket.gethostname()}:{os.getpid()}:{token_hex(8)}"
        return self._name

    @property
    def moved(self) -> bool:
        """Whether this memory goes on elsewhere, or after a sleep that only one of its clocks noticed."""
        slept_s = self._clock() - self._now() - self._offset_s
        return self._place_now() != self._place or abs(slept_s) > _CLOCK_STEP_S


def _place() -> str:
    boot = _BOOT.read_text() if _BOOT.is_file() else ""
    return f"{socket.gethostname()} {boot}"
