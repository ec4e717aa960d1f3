"""When to retry a failed start, and how to refuse requests meanwhile. Imports nothing heavy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from knapper.errors import Unavailable, Unservable
from knapper.web.backoff import Backoff

_PAUSE_S, _PAUSE_MAX_S = 1.0, 30.0
_NUMBER: Final = re.compile(r"[\d.]+")
_WAIT_S: Final = 5.0  # between looks whether there is memory now
_SOON_S: Final = 2.0  # the retry interval for clients while an attempt is under way

log = structlog.get_logger()


class Attempts:
    """Attempts to start `what`. Pauses double up to half a minute, and are never shorter than the last attempt took.

    `now`: monotonic seconds.
    """

    def __init__(self, what: str, now: Callable[[], float]) -> None:
        self.reason = ""  # of the newest failure; empty if there is none
        self._what = what
        self.now = now
        self._backoff = Backoff(_PAUSE_S, _PAUSE_MAX_S)
        self._next = 0.0
        self._waits = False

    @property
    def due(self) -> bool:
        return self.now() >= self._next

    def waits(self, reason: str) -> None:
        """Not a failure: it goes on once something else has ended."""
        self._next, self._waits = self.now() + _WAIT_S, True
        if not self.reason:
            log.info(f"{self._what} waits: {reason}")
            self.reason = reason

    def failed(self, reason: str, took_s: float = 0.0, times: int = 1) -> None:
        """Logs a new reason. `times`: the number of failures that this call reports."""
        self._backoff.failures += times - 1
        pause_s = max(self._backoff.next(), took_s)
        self._next, self._waits = self.now() + pause_s, False
        if _NUMBER.sub("", reason) != _NUMBER.sub("", self.reason):  # another amount of free memory is no news
            log.error(f"{self._what} cannot be served: {reason}", next_attempt_s=round(pause_s))
            self.reason = reason

    def succeeded(self) -> None:
        if self.reason:
            log.info(f"{self._what} is served again", attempts=self._backoff.failures + 1)
        self.reason = ""
        self._backoff.reset()

    def refusal(self) -> Unavailable:
        """The error for requests: the same sentence each time, so that clients show it once."""
        if self._waits:
            return Unavailable(f"{self._what} waits: {self.reason}", max(_SOON_S, self._next - self.now()))
        sentence = (
            f"{self._what} cannot be served: {self.reason.rstrip('.')}. Only its operator can fix that; "
            "it is tried again by itself, and what waits goes on then"
        )
        return Unservable(sentence, max(_SOON_S, self._next - self.now()))


class Deaths:
    """Counts how often the process died during an attempt, as one killed for its memory does.

    The count is in a file, which outlives the process: a restarted container keeps its /tmp.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def count(self) -> int:
        try:
            return int(self._path.read_text())
        except (OSError, ValueError):
            return 0

    def begin(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(str(self.count + 1))
        except OSError:
            pass  # without a writable directory nothing is counted

    def survived(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            pass
