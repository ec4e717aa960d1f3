"""What a sequence had of the GPU, where nobody outside of vLLM's core sees its batches: a share of the wall clock.

Each second in which n sequences are under way is divided into n equal parts, whatever the core computes for them. The
shares of all sequences add up to the time in which there was any. On a GPU that others use too, it is an upper bound.
"""

from collections.abc import Callable


class DeviceTime:
    """`now` in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._at = 0.0  # when both of these were last brought up to date
        self._per_sequence_s = 0.0  # seconds of a sequence that had been under way since the beginning
        self._busy_s = 0.0
        self._active = 0

    @property
    def device_s(self) -> float:
        """The seconds in which a sequence was under way."""
        self._advance()
        return self._busy_s

    def begin(self) -> Callable[[], float]:
        """A sequence begins. Call what is returned once, when it ends: it says what the sequence had."""
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
            self._per_sequence_s += (now - self._at) / self._active
            self._busy_s += now - self._at
        self._at = now
