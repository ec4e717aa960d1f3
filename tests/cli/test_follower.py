"""How long `--follow` waits for a job that is not there yet."""

from itertools import count
from typing import Any

import pytest

from knapper import limits
from knapper.cli import jobs_follower
from knapper.cli.jobs_client import JobsClient
from knapper.cli.jobs_follower import Follower
from knapper.errors import NotFound

_ENDED: dict[str, Any] = {"state": "completed", "kind": "sft", "step": 0, "metrics": []}


class _Inbox(JobsClient):
    """A server that finds the job `found_s` after the first question, on the clock that questions advance."""

    def __init__(self, found_s: float) -> None:
        super().__init__("http://127.0.0.1:9", "tml-local")
        self._found_s, self._asked, self.clock_s = found_s, count(), 0.0

    def show(self, job: str, after: int = 0) -> dict[str, Any]:
        self.clock_s = next(self._asked) * jobs_follower._POLL_S
        if self.clock_s < self._found_s:
            raise NotFound(f"job {job!r} does not exist")
        return _ENDED


def follower(inbox: _Inbox, monkeypatch: pytest.MonkeyPatch) -> Follower:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    return Follower(inbox, "adding", lambda: inbox.clock_s)


def test_an_upload_that_nobody_announces_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest_s = limits.job_inbox_look_s + 10.0  # uploaded as the longest pause began, and the job starts
    assert follower(_Inbox(slowest_s), monkeypatch).follow() == _ENDED


def test_a_job_that_never_comes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = _Inbox(1e9)
    with pytest.raises(NotFound):
        follower(inbox, monkeypatch).follow()
    assert limits.job_appears_s < inbox.clock_s < limits.job_appears_s + 2
