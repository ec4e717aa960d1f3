"""A sequence's part of the GPU's time, as an equal share of the wall clock: vLLM's core hides its batches.

Each second with n active sequences is divided into n equal parts, whatever the core computes for them. The parts of all
sequences add up to the time with any active. On a GPU with other users it is an upper bound.
"""

from collections.abc import Callable


class DeviceTime:
    """`now` in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._updated_s = 0.0  # when both of these were last updated
        self._per_sequence_s = 0.0  # seconds of a sequence that was active from the start
        self._busy_s = 0.0
        self._active = 0

    @property
    def device_s(self) -> float:
        """Seconds with any active sequence."""
        self._advance()
        return self._busy_s

    def begin(self) -> Callable[[], float]:
        """Start a sequence. Call the result once, when it ends: it returns the sequence's seconds."""
        self._advance()
        self._active += 1
        before = self._per_sequence_s

        def end() -> float:
            self._advance()
            self._active -= 1
            return self._per_sequence_s - before

        return end

    def _advance(self) -> None:
        now = self._now()
        if self._active:
            self._per_sequence_s += (now - self._updated_s) / self._active
            self._busy_s += now - self._updated_s
        self._updated_s = now
