"""What a function answers from, or the reason why there is nothing: the process stays up, and says it.

A process that ended with its model's fault would be started again and again, here as in a pod, while whoever waits
hears nothing. The first attempt is made before the port binds; a later one begins when somebody asks, beside the
answers that give the reason.
"""

import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import structlog

from knapper.concurrency.retry import Attempts, Deaths
from knapper.engine import host_memory
from knapper.errors import KnapperError

_DEATHS_MAX: Final = 2  # then the process stands, and says so, before it tries again
_KILLED: Final = (
    "its process was killed, time and again, while it loaded, as one is that takes more memory than there is: give it "
    "more, or serve a smaller model"
)

T = TypeVar("T")
log = structlog.get_logger()


class Gate(Generic[T]):
    """`load` blocks, and may raise anything; `what` it loads, as a refusal names it. `now`: monotonic seconds."""

    def __init__(self, what: str, load: Callable[[], T], deaths: Deaths, now: Callable[[], float]) -> None:
        self._load = load
        self._deaths = deaths
        self._now = now
        self._attempts = Attempts(what, now)
        self._loaded: T | None = None
        self._trying = threading.Lock()

    def open(self) -> None:
        """The first attempt, if there was none. Blocks."""
        if self._loaded is not None or self._attempts.reason:
            return
        if (died := self._deaths.count) >= _DEATHS_MAX:
            self._attempts.failed(_KILLED, times=died)
            return
        with self._trying:
            self._try()

    def value(self) -> T:
        """What was loaded. Raises Unservable at once while there is nothing."""
        if self._loaded is None:
            if self._attempts.due and self._trying.acquire(blocking=False):
                threading.Thread(target=self._try_beside, name="another attempt", daemon=True).start()
            raise self._attempts.refusal()
        return self._loaded

    def _try_beside(self) -> None:
        try:
            self._try()
        finally:
            self._trying.release()

    def _try(self) -> None:
        began = self._now()
        self._deaths.begin()
        try:
            self._loaded = self._load()
            self._attempts.succeeded()
        except Exception as error:  # noqa: BLE001  the border of the process: whatever it is, whoever asks is told
            self._attempts.failed(self._why(error), self._now() - began)
        finally:
            self._deaths.survived()

    def _why(self, error: Exception) -> str:
        match error:
            case KnapperError():
                return str(error)
            case ImportError():
                return f"{error}: install what it needs (pip install 'knapper[train]'), or mend what is installed"
            case OSError():
                return (
                    f"{error.strerror or error}: {error.filename or 'the model'}; free space, or give the right to read"
                )
            case MemoryError():
                return f"it does not fit into the memory, of which {host_memory.available() >> 20} MiB are free"
        if not self._attempts.reason:
            log.error("defect", exc_info=error)
        return f"loading it met a defect: {type(error).__name__}: {error}"
