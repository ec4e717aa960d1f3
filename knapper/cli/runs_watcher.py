"""`knapper runs watch`: prints a run's steps, alarms and pauses as they come."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from knapper.cli.runs_client import RunsClient, alarm_lines, left, step_line
from knapper.cli.sinks import Forwarder
from knapper.text.printable import say

_POLL_S: Final = 1.0
_PAUSE_EVERY_S: Final = 10.0  # a pause is printed again after so long


@dataclass
class RunWatcher:
    """`steps`: the step at which it ends; None: never. `now`: monotonic seconds."""

    client: RunsClient
    run: str
    steps: int | None
    now: Callable[[], float]
    forwarder: Forwarder
    _step: float = -1.0  # the newest that was printed
    _said: set[tuple[str, int]] = field(default_factory=set)
    _paused_at: float = float("-inf")

    def watch(self) -> None:
        """Until step `steps`, or Ctrl-C. Raises the client's errors."""
        while True:
            progress = self.client.progress(self.run)
            self.forwarder.send(progress["points"])
            say(*self._news(progress))
            if self.steps is not None and self._step >= self.steps:
                return
            time.sleep(_POLL_S)

    def _news(self, progress: dict[str, Any]) -> Iterator[str]:
        points = [point for point in progress["points"] if point["step"] > self._step]
        for n, point in enumerate(points, 1):
            estimate = left(progress["points"], self.steps) if n == len(points) else ""
            yield f"{step_line(point, self.steps)}  {estimate}".rstrip()
            self._step = point["step"]
        new = [alarm for alarm in progress["alarms"] if (alarm["name"], alarm["step"]) not in self._said]
        self._said |= {(alarm["name"], alarm["step"]) for alarm in new}
        yield from alarm_lines(new)
        if progress["reason"] and self.now() - self._paused_at > _PAUSE_EVERY_S:
            self._paused_at = self.now()
            yield f"{progress['state']}: {progress['reason']}"
