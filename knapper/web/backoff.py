"""Exponential back-off."""

from dataclasses import dataclass


@dataclass
class Backoff:
    """Pauses in seconds, each twice as long as the one before, from `first_s` up to `max_s`."""

    first_s: float
    max_s: float
    failures: int = 0  # in a row

    def next(self) -> float:
        """The pause after one more failure."""
        pause_s = min(self.first_s * 2.0 ** min(self.failures, 1000), self.max_s)  # floats end at 2**1024
        self.failures += 1
        return pause_s

    def reset(self) -> None:
        """Start over after a success."""
        self.failures = 0
