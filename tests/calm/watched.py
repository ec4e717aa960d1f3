"""Two servers whose health is asked all the time: the one that works, and one that does nothing, beside it.

How long others wait is what the first takes longer than the second at the same moment: on a busy machine both are late.
"""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_LATE_S = 0.1  # asks so near one another saw the same machine
_KEPT = 20_000  # more than come in the longest that one sending may take


class Asked(NamedTuple):
    began: float
    took: float

    def near(self, other: "Asked") -> bool:
        return self.began - _LATE_S < other.began + other.took and other.began - _LATE_S < self.began + self.took


class Watch:
    """One process that asks."""

    def __init__(self, url: str, log: Path) -> None:
        with log.open("wb") as out:
            self._process = subprocess.Popen([sys.executable, _HERE / "watch.py", f"{url}/api/v1/healthz"], stdout=out)
        self._log = log.open(encoding="ascii")
        self._rest = ""  # of a line that is not whole yet
        self._asked: deque[Asked] = deque(maxlen=_KEPT)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def between(self, begin: float, end: float) -> list[Asked]:
        """What was asked then; it returns when it is known of all."""
        limit = time.monotonic() + 300
        while True:
            *lines, self._rest = (self._rest + self._log.read()).split("\n")
            self._asked.extend(Asked(*map(float, line.split())) for line in lines)
            if self._asked and self._asked[-1].began > end:
                return [each for each in self._asked if each.began < end and each.began + each.took > begin]
            assert self._process.poll() is None, "the server's health does not answer"
            assert time.monotonic() < limit, "the server's health does not answer"
            time.sleep(0.02)


class Watched:
    def __init__(self, working: Watch, idle: Watch) -> None:
        self._working, self._idle = working, idle

    def waited(self, begin: float, end: float) -> float:
        """The longest that others waited for the server that works, beyond what the machine made them wait; seconds."""
        idle = self._idle.between(begin - 1, end + 1)
        requests = self._working.between(begin, end)
        assert requests, "there was a request meanwhile"
        return max(
            each.took - max((other.took for other in idle if each.near(other)), default=0.0) for each in requests
        )


@contextmanager
def watched(url: str, directory: Path) -> Iterator[Watched]:
    with ExitStack() as stack:
        idle_url = stack.enter_context(_idle_server(directory))
        working, idle = Watch(url, directory / "working.log"), Watch(idle_url, directory / "idle.log")
        stack.callback(working.close)
        stack.callback(idle.close)
        yield Watched(working, idle)


@contextmanager
def _idle_server(directory: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "uvicorn", "tests.calm.idle:app", "--port", "0", "--loop", "uvloop"]
    log = directory / "idle-server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=_HERE.parents[1], stdout=out, stderr=out)
    try:
        while "running on " not in (output := log.read_text(encoding="utf-8")):
            assert process.poll() is None, output
            time.sleep(0.05)
        yield output.partition("running on ")[2].split()[0]
    finally:
        process.terminate()
        process.wait()
