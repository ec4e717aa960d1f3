"""`--follow`: prints a job's progress, from before it exists to its end, through restarts of its server."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from knapper import limits
from knapper.cli import jobs_trials
from knapper.cli.jobs_client import ENDED, JobsClient, doing, lines, timing
from knapper.cli.sinks import Forwarder
from knapper.errors import KnapperError, NotFound, UserError
from knapper.text.durations import clock
from knapper.text.printable import say

_POLL_S: Final = 1.0
_QUIET_S: Final = 10.0  # without a step for this long, the current activity is printed again


@dataclass
class Follower:
    """`now`: monotonic seconds."""

    client: JobsClient
    job: str
    now: Callable[[], float]
    forwarder: Forwarder = field(default_factory=Forwarder)
    _after: int = 0  # steps printed
    _ended: set[int] = field(default_factory=set)  # trials printed, of a sweep
    _phase: str = ""
    _printed_at: float = float("-inf")
    _answered_at: float | None = None  # when the server last answered
    _waits: bool = False  # and printed so

    def follow(self) -> dict[str, Any]:
        """Print each step, and the activity between steps; return the job's final state.

        Raises NotFound if the job does not appear within six minutes, and the client's error if the server does not
        answer the first call, or for a quarter of an hour. Ctrl-C ends the printing, not the job.
        """
        began = self.now()
        while True:
            job = self._ask(began)
            if job is not None:
                self.forwarder.send([step | {"at": _seconds(step["at"])} for step in job["metrics"]])
                say(*self._news(job))
                if job["metrics"]:
                    self._after = job["metrics"][-1]["step"]
                    continue  # there may be more
                if job["state"] in ENDED:
                    return job
            time.sleep(_POLL_S)

    def _ask(self, began: float) -> dict[str, Any] | None:
        """The job's state from the server; None while it cannot answer, which is printed once."""
        try:
            job = self.client.show(self.job, self._after)
        except NotFound:
            if self._answered_at is not None or self.now() - began > limits.job_appears_s:
                raise
            self._wait(f"there is no job {self.job!r} yet; waiting for it, as an upload may be found minutes later")
            return None
        except UserError:
            raise
        except KnapperError as error:
            if self._answered_at is None or self.now() - self._answered_at > limits.job_server_lost_s:
                raise
            self._wait(f"{error}; waiting for it: the job continues with its server")
            return None
        if self._waits and self._answered_at is not None:
            say("the server answers again", file=sys.stderr)
        self._answered_at, self._waits = self.now(), False
        return job

    def _wait(self, why: str) -> None:
        if not self._waits:
            say(why, file=sys.stderr)
        self._waits = True

    def _news(self, job: dict[str, Any]) -> list[str]:
        """Each new step; without one the current activity, if it is new or was not printed for a while.

        Activities change often between steps: after the first step, only long ones are printed.
        """
        printed = [f"{_when(job, step)}  {line}" for step, line in zip(job["metrics"], lines(job), strict=True)]
        if printed and (left := timing(job)):
            printed[-1] += f"  {left}"
        elapsed = f"{clock(job.get('elapsed_seconds', 0.0)):>7}"
        printed += [f"{elapsed}  {line}" for line in jobs_trials.ended(job, self._ended)]
        phase, now = doing(job, counts=False), self.now()
        if not printed and phase:
            first = phase != self._phase and not job["step"]
            if first or now - self._printed_at > _QUIET_S:
                printed.append(f"{elapsed}  {doing(job)}")
                self._phase = phase
        if printed:
            self._printed_at = now
        return printed


def _when(job: dict[str, Any], step: dict[str, Any]) -> str:
    """Time from the job's start to the end of the step."""
    return f"{clock(_seconds(step['at']) - _seconds(job['started_at'])):>7}"


def _seconds(at: str) -> float:
    """Since the epoch."""
    return datetime.fromisoformat(at).timestamp()
