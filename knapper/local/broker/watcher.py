"""Files in the inbox become the events that a bucket would send.

A file is announced once it has been still for a moment, so that one that is being copied does not start half a job;
`mv` from the same disk is complete at once. Files that came while no watcher ran are found at the start.
"""

import asyncio
import hashlib
import mimetypes
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import structlog
from watchfiles import awatch

from knapper.errors import KnapperError, StoreError, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.exchange.directory import DirectoryExchange
from knapper.store import files
from knapper.wire.untrusted import parsing

_FOLDERS: Final = 2  # inbox/<tenant>/<job>/<file>: nothing of a job lies deeper
_STILL_S: Final = 0.3
_LOOK_S: Final = 10.0  # even without a notification: some file systems send none

log = structlog.get_logger()
_Stat = tuple[int, int]  # bytes, modified at ns


class Watcher:
    """Posts an event once for each content of each file."""

    def __init__(self, root: Path, post: Callable[[Event], Awaitable[object]]) -> None:
        self._exchange = DirectoryExchange(root)
        self._inbox = root.resolve() / "inbox"
        self._post = post
        self._announced: dict[Path, _Stat] = {}

    async def watch(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        moved = asyncio.Event()
        listening = asyncio.create_task(self._listen(moved, stop))
        try:
            while not stop.is_set():
                moved.clear()
                try:
                    await self._look()
                except KnapperError as error:  # the next look announces what this one could not
                    log.warning("the inbox cannot be read", code=error.code, reason=str(error))
                except Exception:
                    log.exception("the inbox: defect")
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await moved.wait()
                except TimeoutError:
                    pass
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, moved: asyncio.Event, stop: asyncio.Event) -> None:
        try:
            async for _ in awatch(self._inbox, stop_event=stop, debounce=200, step=50):
                moved.set()
        except (OSError, RuntimeError) as error:  # the system has no watches left
            log.warning(f"the inbox is polled every {_LOOK_S:.0f} s", reason=str(error))
        moved.set()

    async def _look(self) -> None:
        """Announce new files that are still."""
        before = await asyncio.to_thread(self._stats)
        self._announced = {path: known for path, known in self._announced.items() if path in before}
        new = {path: stat for path, stat in before.items() if self._announced.get(path) != stat}
        while new:
            await asyncio.sleep(_STILL_S)
            now = await asyncio.to_thread(self._stats)
            for path in [path for path, stat in new.items() if now.get(path) == stat]:
                await self._announce(path, modified_ns=new[path][1])
                self._announced[path] = new[path]
            new = {path: stat for path, stat in now.items() if self._announced.get(path) != stat}

    def _stats(self) -> dict[Path, _Stat]:
        stats: dict[Path, _Stat] = {}
        try:
            with files.below(self._inbox.parent, ["inbox"]) as inbox:
                for name, folder, last in files.regular(inbox, "inbox", _FOLDERS):
                    if not last.startswith("."):
                        with suppress(FileNotFoundError):
                            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
                            stats[self._inbox.parent / name] = (status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise StoreError(f"cannot look into {self._inbox}: {error.strerror}") from error
        return stats

    async def _announce(self, path: Path, modified_ns: int) -> None:
        """Announce one file. A file that cannot be announced, whatever its name, stops no other."""
        name = path.relative_to(self._inbox.parent).as_posix()
        try:
            with parsing(lambda error: UserError(f"it has a name or a time that no event can have: {error}")):
                name.encode()
                entry = await self._exchange.entry(name)
                if entry is None:
                    return
                event = finalized(entry.name, entry.generation, entry.size, modified_ns / 1e9)
            await self._post(event)
        except (StoreError, UserError) as error:
            log.warning("a file in the inbox cannot be announced", file=name, reason=str(error))
            return
        log.debug("a file arrived", file=name, bytes=entry.size)


def finalized(name: str, generation: str, size: int, modified_s: float, bucket: str = "local") -> Event:
    """The event that says that an object was created, in the shape that Eventarc gives it: numbers are strings."""
    when = datetime.fromtimestamp(modified_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data = {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "bucket": bucket,
        "name": name,
        "generation": generation,
        "metageneration": "1",
        "size": str(size),
        "contentType": mimetypes.guess_type(name)[0] or "application/octet-stream",
        "timeCreated": when,
        "updated": when,
    }
    return Event(
        type=cloudevents.OBJECT_FINALIZED,
        source=f"//storage.googleapis.com/projects/_/buckets/{bucket}",
        subject=f"objects/{name}",
        id=hashlib.sha256(f"{bucket}/{name}#{generation}".encode()).hexdigest()[:32],
        data=msgspec.json.encode(data),
    )
