"""What a process does before it ends by SIGTERM: those who ring it directly hear that it leaves, cores are given up."""

import signal
from collections.abc import Callable
from types import FrameType

_first: list[Callable[[], None]] = []


def before(leave: Callable[[], None]) -> None:
    """Call it first, whichever thread this is."""
    _first.append(leave)


def heed(*, by_itself: bool = False) -> None:
    """From now on; on the main thread only. What the signal did before, it does then.

    `by_itself`: the server ends itself by the signal once it has drained, and what is registered with atexit would not
    run. Blocked from the first one on, the signal cannot; the process then ends as one that has nothing left to do.
    """
    others = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        for leave in _first:
            leave()
        if callable(others):
            if by_itself:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            others(number, frame)
        else:
            signal.signal(number, others)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)
