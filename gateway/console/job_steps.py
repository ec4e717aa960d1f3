"""The steps of jobs, for curves: read once, since a step that is done never changes."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from knapper import limits
from knapper.jobs import outputs
from knapper.jobs.names import Start
from knapper.jobs.progress import newest_step
from knapper.state import damage
from knapper.state.job_records import Trained, read
from knapper.store import Store
from knapper.store.cache import LruCache

_JOBS_MAX: Final = 16


@dataclass
class _Steps:
    """`through`: how many steps were read, or left out because they are too old for a curve."""

    through: int
    points: "deque[dict[str, Any]]" = field(default_factory=lambda: deque(maxlen=limits.console_points_max))


class JobSteps:
    """Those of the jobs that were looked at last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: LruCache[Start, _Steps] = LruCache(_JOBS_MAX)

    async def of(self, start: Start) -> list[dict[str, Any]]:
        """The newest steps as in metrics.jsonl, with `tokens`; one read for each that is new, and one more."""
        if (known := self._known.known(start)) is None:
            done = await newest_step(self._store, start)
            first = max(0, done - limits.console_points_max)
            steps = await damage.readable(range(first, done), lambda n: self._point(start, n))
            if (known := self._known.known(start)) is None:
                self._known.keep(start, known := _Steps(done))
                known.points.extend(point for point in steps if point is not None)
        while (point := await damage.unless(self._point(start, known.through), None)) is not None:
            if point["step"] == known.through + 1:  # else another reader was faster
                known.through += 1
                known.points.append(point)
        return list(known.points)

    async def _point(self, start: Start, n: int) -> dict[str, Any] | None:
        trained = await read(self._store, start.trained(n), Trained)
        return None if trained is None else outputs.metrics_line(n + 1, trained) | {"tokens": trained.tokens}
