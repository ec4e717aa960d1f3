"""Starts the other ranks and watches them, by PyTorch's elastic multiprocessing. Rank 0's process has no other use for
itself than its ranks together: if one ends, or keeps it waiting too long, it ends too, and a new one goes on from the
journal.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Final, NoReturn

import structlog
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from knapper.engine.ranks import signs
from knapper.errors import UserError

_PREFIX: Final = "knapper-ranks-"  # then the process's id
_POLL_S: Final = 0.2
_NOTICE_S: Final = 2.0
LOST: Final = os.EX_TEMPFAIL  # the exit status of a process that lost a rank

log = structlog.get_logger()


class Followers:
    """Ranks 1 to size - 1. Created on a thread that lives as long as they should: Linux ends them with it."""

    def __init__(self, size: int, arguments: tuple[str, ...]) -> None:
        """`arguments`: of `worker`, behind the meeting place, the rank and the size."""
        forget_dead(Path(gettempdir()))
        self._directory = TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-")
        self.meeting = Path(self._directory.name)
        self.ranks = range(1, size)
        self._processes = start_processes(
            name="rank",
            entrypoint=sys.executable,
            args={
                rank - 1: (
                    "-m", "knapper.engine.ranks.worker",
                    str(os.getpid()), str(self.meeting), str(rank), str(size), *arguments,
                )
                for rank in self.ranks
            },
            envs={rank - 1: {} for rank in self.ranks},
            logs_specs=DefaultLogsSpecs(log_dir=str(self.meeting / "logs")),
        )  # fmt: skip

    @property
    def pids(self) -> list[int]:
        return list(self._processes.pids().values())

    def until(self, sign: str) -> list[str]:
        """What each wrote with this sign. Raises UserError with the reason of the first that ends before it."""
        while True:
            found = [signs.read(self.meeting, rank, sign) for rank in self.ranks]
            texts = [text for text in found if text is not None]
            if len(texts) == len(found):
                return texts
            if ended := self.ended():
                raise UserError(ended)
            time.sleep(_POLL_S)

    def ended(self) -> str:
        """Which rank has ended, and why; empty while all run."""
        result = self._processes.wait(0)
        if result is None:
            return ""
        for local, failure in sorted(result.failures.items(), key=lambda item: item[1].timestamp):
            reason = signs.read(self.meeting, local + 1, signs.FAILED)
            return f"rank {local + 1} {reason or _ending(failure.exitcode)}"
        return "all other ranks have ended"

    def kill(self) -> None:
        self._processes.close(signal.SIGKILL)
        with suppress(OSError):
            self._directory.cleanup()


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def forget_dead(directory: Path) -> None:
    """Delete meeting places of processes that were killed, which could not do so themselves."""
    for left in directory.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):  # containers have the same ones again
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


class Watch:
    """Looks after the ranks on a thread of its own. `ends`: what happens when one is lost."""

    def __init__(
        self, followers: Followers, deadline_s: float, ends: Callable[[str], NoReturn], now: Callable[[], float]
    ) -> None:
        self._followers, self._deadline_s, self._ends, self._now = followers, deadline_s, ends, now
        self._waiting_since: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="ranks", daemon=True).start()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Around whatever needs other ranks. An error there is one of the connection: nothing can go on."""
        self._waiting_since = self._now()
        try:
            yield
        except Exception as error:  # noqa: BLE001  ranks that are out of step cannot be brought together again
            self._ends(f"{self._ended_soon() or 'a rank'}: {error}")
        finally:
            self._waiting_since = None

    def close(self) -> None:
        self._closed.set()

    def _ended_soon(self) -> str:
        """A connection may be gone before its process is: whose it was, if that shows."""
        until = self._now() + _NOTICE_S
        while not (ended := self._followers.ended()) and self._now() < until:
            time.sleep(_POLL_S)
        return ended

    def _look(self) -> None:
        while not self._closed.wait(_POLL_S):
            since = self._waiting_since
            if since is not None and self._now() - since > self._deadline_s:
                self._ends(f"a rank kept the others waiting for more than {self._deadline_s:g} s")
            if (ended := self._followers.ended()) and not self._closed.is_set():
                self._ends(ended)


def ends_with(followers: Followers) -> Callable[[str], NoReturn]:
    """Ends the process: what is waiting in a collective cannot be called back."""
    lock = threading.Lock()

    def end(reason: str) -> NoReturn:
        with lock:  # never given back: the first reason is the one
            log.error("a rank is lost: this process ends, and the next one goes on from the journal", reason=reason)
            followers.kill()
            os._exit(LOST)

    return end
