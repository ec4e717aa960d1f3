"""Kills spread over a training, each at a random moment of its step."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from knapper.chaos.targets import Target, Targets
from knapper.errors import KnapperError, Unavailable

_APPEARS_S = 60.0
_LOOK_S = 0.1


class Killer:
    """`kills` of them over `steps` steps, each within a step's usual length of its beginning.

    Whoever was killed least is next: each role has its turn as long as it lives.
    """

    def __init__(
        self, targets: Targets, kills: int, steps: int, step_s: float, seed: int, sleep: Callable[[float], None]
    ) -> None:  # fmt: skip
        self._targets, self._step_s, self._sleep = targets, step_s, sleep
        self._draw = np.random.default_rng([seed, 1])
        self._due = Counter(int(n) for n in self._draw.choice(steps, kills, replace=kills > steps))
        self._thread: threading.Thread | None = None
        self._failure: KnapperError | None = None
        self.killed: Counter[str] = Counter()

    def before_step(self, step: int) -> None:
        if count := self._due[step]:
            delays = np.diff(np.sort(self._draw.random(count)) * self._step_s, prepend=0.0)
            self._thread = threading.Thread(target=self._strike, args=(delays.tolist(),), daemon=True)
            self._thread.start()

    def after_step(self) -> None:
        """All kills of the step are done. Raises KnapperError if one could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _strike(self, delays: Sequence[float]) -> None:
        try:
            for delay in delays:
                self._sleep(delay)
                self.killed[self._one().role] += 1
        except KnapperError as error:
            self._failure = error

    def _one(self) -> Target:
        for _ in range(int(_APPEARS_S / _LOOK_S)):
            living = sorted(self._targets.living(), key=lambda each: (each.role, each.name))
            fewest = min((self.killed[each.role] for each in living), default=0)
            turn = [each for each in living if self.killed[each.role] == fewest]
            if turn and self._targets.kill(target := turn[int(self._draw.integers(len(turn)))]):
                return target
            self._sleep(_LOOK_S)
        raise Unavailable(f"nothing to kill appeared within {_APPEARS_S:.0f} s; look at the deployment's own log")
