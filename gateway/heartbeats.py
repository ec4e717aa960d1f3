"""The last heartbeat of each session. In memory: after a restart every session has its full time again."""

from collections.abc import Callable

from knapper import limits
from knapper.ids import SessionId


class Heartbeats:
    """`now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._last_seen: dict[SessionId, float] = {}

    def record(self, session: SessionId) -> None:
        self._last_seen[session] = self._now()

    def is_alive(self, session: SessionId) -> bool:
        """Whether the session's client lives, as far as this process knows."""
        return self._now() - self._last_seen.get(session, float("-inf")) < limits.session_timeout_s

    def forget(self, session: SessionId) -> None:
        self._last_seen.pop(session, None)

    def lapsed(self) -> list[SessionId]:
        """Sessions without a heartbeat for too long; each is returned once."""
        before = self._now() - limits.session_timeout_s
        lapsed = [session for session, at in self._last_seen.items() if at < before]
        for session in lapsed:
            del self._last_seen[session]
        return lapsed
