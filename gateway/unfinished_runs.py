"""Runs with work undone, each looked at again: soon at first, and ever later while nothing changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from knapper.ids import RunId, SessionId, session_of
from knapper.web.backoff import Backoff

_SOON_S, _LATE_S = 5.0, 60.0


@dataclass
class _Wait:
    far: object  # how far the run was at the last look
    at: float
    pauses: Backoff = field(default_factory=lambda: Backoff(_SOON_S, _LATE_S))


class Waits:
    """`now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._waits: dict[RunId, _Wait] = {}

    def due(self, waiting: Mapping[RunId, object]) -> list[RunId]:
        """Those to be looked at now. `waiting`: all that wait, and how far each is."""
        now = self._now()
        before, self._waits = self._waits, {}
        for run, far in waiting.items():
            known = before.get(run)
            self._waits[run] = known if known is not None and known.far == far else _Wait(far, now)
        return [run for run, wait in self._waits.items() if wait.at <= now]

    def looked(self, run: RunId) -> None:
        """It was looked at, and nothing went wrong."""
        if (wait := self._waits.get(run)) is not None:
            wait.at = self._now() + wait.pauses.next()

    def stir(self, session: SessionId) -> None:
        """Look at the session's runs again soon."""
        for run, wait in self._waits.items():
            if session_of(run) == session:
                wait.at = self._now()
