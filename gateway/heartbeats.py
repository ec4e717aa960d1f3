"""When each session was last heard of. In memory: a restarted gateway starts counting anew, to the client's favour."""

from collections.abc import Callable

from knapper import limits
from knapper.ids import SessionId


class Heartbeats:
    """`now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._heard: dict[SessionId, float] = {}

    def hear(self, session: SessionId) -> None:
        self._heard[session] = self._now()

    def heard(self, session: SessionId) -> bool:
        """Whether its client lives, as far as this process knows."""
        return self._now() - self._heard.get(session, float("-inf")) < limits.session_timeout_s

    def forget(self, session: SessionId) -> None:
        self._heard.pop(session, None)

    def lapsed(self) -> list[SessionId]:
        """Sessions that were silent for too long; each is told once."""
        before = self._now() - limits.session_timeout_s
        gone = [session for session, at in self._heard.items() if at < before]
        for session in gone:
            del self._heard[session]
        return gone
