"""A lazily loaded value, or the reason why it cannot be loaded: the process stays up and reports it.

A process that exited because of its model would be restarted again and again, locally as in a pod, while clients wait
without a reason. The first attempt is made before the port binds; a later one starts when a request comes, while
requests are refused with the reason.
"""

import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import structlog

from knapper.concurrency.retry import Attempts, Deaths
from knapper.engine import host_memory
from knapper.errors import KnapperError, WaitsForMemory

_DEATHS_MAX: Final = 2  # then the process starts without an attempt, and reports the reason first
_KILLED: Final = (
    "its process was killed, time and again, while it loaded, as one is that takes more memory than there is: give it "
    "more, or serve a smaller model"
)

T = TypeVar("T")
log = structlog.get_logger()


class Gate(Generic[T]):
    """`load` blocks, and may raise anything. `what`: its name in refusals. `now`: monotonic seconds."""

    def __init__(self, what: str, load: Callable[[], T], deaths: Deaths, now: Callable[[], float]) -> None:
        self._load = load
        self._deaths = deaths
        self._now = now
        self._attempts = Attempts(what, now)
        self._loaded: T | None = None
        self._attempt_lock = threading.Lock()

    def open(self) -> None:
        """Make the first attempt, if there was none. Blocks."""
        if self._loaded is not None or self._attempts.reason:
            return
        if (died := self._deaths.count) >= _DEATHS_MAX:
            self._attempts.failed(_KILLED, times=died)
            return
        with self._attempt_lock:
            self._try()

    def value(self) -> T:
        """The loaded value. Raises Unavailable at once if there is none: Unservable, unless it only waits."""
        if self._loaded is None:
            if self._attempts.due and self._attempt_lock.acquire(blocking=False):
                threading.Thread(target=self._try_in_background, name="another attempt", daemon=True).start()
            raise self._attempts.refusal()
        return self._loaded

    def _try_in_background(self) -> None:
        try:
            self._try()
        finally:
            self._attempt_lock.release()

    def _try(self) -> None:
        began = self._now()
        self._deaths.begin()
        try:
            self._loaded = self._load()
            self._attempts.succeeded()
        except WaitsForMemory as error:
            self._attempts.waits(str(error))
        except Exception as error:  # noqa: BLE001  the outermost handler: every error becomes the reason
            self._attempts.failed(self._reason(error), self._now() - began)
        finally:
            self._deaths.survived()

    def _reason(self, error: Exception) -> str:
        match error:
            case KnapperError():
                return str(error)
            case ImportError():
                return f"{error}: install what it needs (pip install 'knapper[train]'), or repair what is installed"
            case OSError():
                return (
                    f"{error.strerror or error}: {error.filename or 'the model'}; free space, or give the right to read"
                )
            case MemoryError():
                return f"it does not fit into the memory, of which {host_memory.available() >> 20} MiB are free"
        if not self._attempts.reason:
            log.error("defect", exc_info=error)
        return f"loading it met a defect: {type(error).__name__}: {error}"
