"""Server-sent events: what is new of a run or a job, read once for everyone who looks at it.

A watcher looks every second while something changes, and ever less often while nothing does; `limits.console_watch_s`
after the last change it says so and ends. A page in a forgotten tab thus costs a few calls of the store, and then none.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper import limits
from knapper.errors import InvalidField, KnapperError, TooMany

_LOOK_S, _LOOK_MAX_S = 1.0, 30.0
_KEEP_ALIVE_S: Final = 15.0  # proxies close an idle connection; and a viewer that left is noticed
_BEHIND_MAX: Final = 256  # events for a viewer that takes none; it is then let go

Look = Callable[[], Awaitable[Any]]  # what is new, for JSON; None: nothing

log = structlog.get_logger()


@dataclass
class _Watch:
    """One thing that is followed. `viewers`: a queue for each; None ends it."""

    task: "asyncio.Task[None] | None" = None
    viewers: "set[asyncio.Queue[bytes | None]]" = field(default_factory=set)


class Watches:
    """All things that are followed here. `now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._watches: dict[str, _Watch] = {}

    @property
    def viewers(self) -> int:
        return sum(len(watch.viewers) for watch in self._watches.values())

    async def follow(self, key: str, look: Look) -> AsyncIterator[bytes]:
        """The events of `key` from now on. `look` of the first viewer serves all. Raises TooMany."""
        if self.viewers >= limits.console_streams_max:
            raise TooMany(f"{self.viewers} pages are followed here; allowed: {limits.console_streams_max}; load anew")
        watch = self._watches.setdefault(key, _Watch())
        events: asyncio.Queue[bytes | None] = asyncio.Queue(_BEHIND_MAX)
        watch.viewers.add(events)
        if watch.task is None:
            watch.task = asyncio.create_task(self._watch(key, watch, look))
        return self._events(key, watch, events)

    async def _events(self, key: str, watch: _Watch, events: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
        try:
            yield b": followed\n\n"
            while True:
                try:
                    async with asyncio.timeout(_KEEP_ALIVE_S):
                        event = await events.get()
                except TimeoutError:
                    yield b": still\n\n"
                    continue
                if event is None:
                    yield b"event: end\ndata: {}\n\n"
                    return
                yield event
        finally:
            watch.viewers.discard(events)
            if not watch.viewers and watch.task is not None:
                watch.task.cancel()
                self._end(key, watch)

    async def _watch(self, key: str, watch: _Watch, look: Look) -> None:
        changed_at, pause_s = self._now(), _LOOK_S
        try:
            while self._now() - changed_at < limits.console_watch_s:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LOOK_MAX_S)
                try:
                    news = await look()
                except KnapperError as error:  # the run was deleted, or the store is away
                    log.debug("a page is followed no more", page=key, code=error.code, reason=str(error))
                    break
                if news is not None:
                    changed_at, pause_s = self._now(), _LOOK_S
                    self._tell(watch, b"event: news\ndata: " + msgspec.json.encode(news) + b"\n\n")
        finally:
            self._end(key, watch)

    def _end(self, key: str, watch: _Watch) -> None:
        if self._watches.get(key) is watch:
            del self._watches[key]
        self._tell(watch, None)

    @staticmethod
    def _tell(watch: _Watch, event: bytes | None) -> None:
        for events in list(watch.viewers):
            if events.full():
                watch.viewers.discard(events)
                while not events.empty():
                    events.get_nowait()
                event = None
            events.put_nowait(event)

    async def close(self) -> None:
        """End all streams: the gateway stops."""
        for key, watch in list(self._watches.items()):
            if watch.task is not None:
                watch.task.cancel()
            self._end(key, watch)


def newest(points: Sequence[Mapping[str, Any]], name: str, default: float = 0.0) -> float:
    """The value that the newest of a curve's points has, by which those after it are known."""
    return float(points[-1][name]) if points else default


async def respond(request: Request, watches: Watches, key: str, look: Look) -> Response:
    """A stream of events. Raises TooMany, and InvalidField for a client that did not ask for one: it may be long."""
    accept = request.headers.get("accept", "")
    if "text/event-stream" not in accept:
        raise InvalidField("the header Accept", accept[:80], "text/event-stream")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    events = await watches.follow(key, look)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
