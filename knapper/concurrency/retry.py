"""When to try again what could not be started, and what to say meanwhile. Loads nothing heavy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from knapper.errors import Unservable
from knapper.web.backoff import Backoff

_PAUSE_S, _PAUSE_MAX_S = 1.0, 30.0
_NUMBER: Final = re.compile(r"[\d.]+")
_SOON_S: Final = 2.0  # an attempt is under way: whoever asks so much later may hear another answer

log = structlog.get_logger()


class Attempts:
    """Of starting `what`. Pauses double up to half a minute, and never are shorter than the attempt before took.

    `now`: monotonic seconds.
    """

    def __init__(self, what: str, now: Callable[[], float]) -> None:
        self.reason = ""  # of the newest failure; empty: there is none
        self._what = what
        self.now = now
        self._backoff = Backoff(_PAUSE_S, _PAUSE_MAX_S)
        self._next = 0.0

    @property
    def due(self) -> bool:
        return self.now() >= self._next

    def failed(self, reason: str, took_s: float = 0.0, times: int = 1) -> None:
        """The reason is logged when it is news. `times`: how often it failed since anybody noted it."""
        self._backoff.failures += times - 1
        pause_s = max(self._backoff.next(), took_s)
        self._next = self.now() + pause_s
        if _NUMBER.sub("", reason) != _NUMBER.sub("", self.reason):  # how much memory is free is no news
            log.error(f"{self._what} cannot be served: {reason}", next_attempt_s=round(pause_s))
            self.reason = reason

    def succeeded(self) -> None:
        if self.reason:
            log.info(f"{self._what} is served again", attempts=self._backoff.failures + 1)
        self.reason = ""
        self._backoff.reset()

    def refusal(self) -> Unservable:
        """What whoever asks is told: the same sentence each time, so that nobody is told it twice."""
        sentence = (
            f"{self._what} cannot be served: {self.reason.rstrip('.')}. Only its operator can fix that; "
            "it is tried again by itself, and what waits goes on then"
        )
        return Unservable(sentence, max(_SOON_S, self._next - self.now()))


class Deaths:
    """How often a process ended in the middle of an attempt, as those that are killed for their memory do.

    Told by a file, which outlives the process: a pod's container that is started again has its /tmp still.
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
            pass  # nothing can be written here: then nothing is remembered

    def survived(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            pass
