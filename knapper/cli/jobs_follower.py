"""`--follow`: a job's course in a terminal, from before it is there to its end, through restarts of its server."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from knapper import limits
from knapper.cli.jobs_client import ENDED, JobsClient, doing, lines, timing
from knapper.errors import KnapperError, NotFound, UserError
from knapper.text.durations import clock
from knapper.text.printable import say

_POLL_S: Final = 1.0
_QUIET_S: Final = 10.0  # without a step for so long, what goes on is said again


@dataclass
class Follower:
    """`now`: monotonic seconds."""

    client: JobsClient
    job: str
    now: Callable[[], float]
    _after: int = 0  # steps that were said
    _phase: str = ""
    _said_at: float = float("-inf")
    _heard_at: float | None = None  # when the server told of the job last
    _waits: bool = False  # which was said

    def follow(self) -> dict[str, Any]:
        """Say each step, and what goes on between steps; return what became of the job.

        Raises NotFound if there is no such job within a minute, and what the client met if the server is silent from
        the first call on, or for a quarter of an hour. Ctrl-C ends the printing, and not the job.
        """
        began = self.now()
        while True:
            told = self._ask(began)
            if told is not None:
                say(*self._news(told))
                if told["metrics"]:
                    self._after = told["metrics"][-1]["step"]
                    continue  # there may be more
                if told["state"] in ENDED:
                    return told
            time.sleep(_POLL_S)

    def _ask(self, began: float) -> dict[str, Any] | None:
        """What the server tells of the job; None while it cannot, which is said once."""
        try:
            told = self.client.show(self.job, self._after)
        except NotFound:
            if self._heard_at is not None or self.now() - began > limits.job_appears_s:
                raise
            self._wait(f"there is no job {self.job!r} yet; waiting for it")
            return None
        except UserError:
            raise
        except KnapperError as error:
            if self._heard_at is None or self.now() - self._heard_at > limits.job_server_lost_s:
                raise
            self._wait(f"{error}; waiting for it: the job goes on with its server")
            return None
        if self._waits and self._heard_at is not None:
            say("the server answers again", file=sys.stderr)
        self._heard_at, self._waits = self.now(), False
        return told

    def _wait(self, why: str) -> None:
        if not self._waits:
            say(why, file=sys.stderr)
        self._waits = True

    def _news(self, told: dict[str, Any]) -> list[str]:
        """Each new step; without one, what the job is doing now, if that is another thing or was not said for long.

        Between steps it changes all the time: once there was one, only what takes long is said.
        """
        found = [f"{_when(told, step)}  {line}" for step, line in zip(told["metrics"], lines(told), strict=True)]
        if found and (left := timing(told)):
            found[-1] += f"  {left}"
        phase, now = doing(told, counts=False), self.now()
        if not found and phase:
            first = phase != self._phase and not told["step"]
            if first or now - self._said_at > _QUIET_S:
                found.append(f"{clock(told.get('elapsed_seconds', 0.0)):>7}  {doing(told)}")
                self._phase = phase
        if found:
            self._said_at = now
        return found


def _when(told: dict[str, Any], step: dict[str, Any]) -> str:
    """How long after its start the job had done the step."""
    seconds = (datetime.fromisoformat(step["at"]) - datetime.fromisoformat(told["started_at"])).total_seconds()
    return f"{clock(seconds):>7}"
