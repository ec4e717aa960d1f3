"""Callbacks that run before a process ends by SIGTERM: it refuses doorbells, and releases its cores."""

import signal
from collections.abc import Callable
from types import FrameType

_callbacks: list[Callable[[], None]] = []


def before(callback: Callable[[], None]) -> None:
    """Call `callback` before the process ends. Any thread may register it."""
    _callbacks.append(callback)


def install(*, by_itself: bool = False) -> None:
    """Install the handler of SIGTERM, on the main thread; after the callbacks it runs the handler installed before.

    `by_itself`: the server sends itself the signal again once it has drained, which would skip atexit. Blocking the
    signal after the first one prevents that: the process then returns from its main function.
    """
    previous = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        for callback in _callbacks:
            callback()
        if callable(previous):
            if by_itself:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            previous(number, frame)
        else:
            signal.signal(number, previous)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)
