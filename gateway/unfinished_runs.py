"""Runs with unfinished work, each checked again: soon at first, and ever later while nothing changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from knapper.ids import RunId, SessionId, session_of
from knapper.web.backoff import Backoff

_SOON_S, _LATE_S = 5.0, 60.0


@dataclass
class _Check:
    progress: object  # of the run at the last check
    next_check: float
    backoff: Backoff = field(default_factory=lambda: Backoff(_SOON_S, _LATE_S))


class UnfinishedRuns:
    """`now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._checks: dict[RunId, _Check] = {}

    def due(self, unfinished: Mapping[RunId, object]) -> list[RunId]:
        """The runs to check now. `unfinished`: every run with unfinished work, and its progress."""
        now = self._now()
        before, self._checks = self._checks, {}
        for run, progress in unfinished.items():
            check = before.get(run)
            self._checks[run] = check if check is not None and check.progress == progress else _Check(progress, now)
        return [run for run, check in self._checks.items() if check.next_check <= now]

    def checked(self, run: RunId) -> None:
        """The check succeeded; the next one comes later."""
        if (check := self._checks.get(run)) is not None:
            check.next_check = self._now() + check.backoff.next()

    def check_soon(self, session: SessionId) -> None:
        """Check the session's runs at the next opportunity."""
        for run, check in self._checks.items():
            if session_of(run) == session:
                check.next_check = self._now()
