"""How a function works on a job it is notified of: one task per job, in slices, until it has no more work here.

A user's error ends the job and says why; a temporary failure is answered 503, and the doorbell comes again.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from knapper import limits
from knapper.errors import (
    InvalidField,
    KnapperError,
    NotFound,
    NotHolder,
    QuotaUsedUp,
    StoreError,
    Unavailable,
    UserError,
)
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import activity, control, outputs
from knapper.jobs.activity import Function
from knapper.jobs.job_files import Folder, Folders
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.jobs.spec import Kind

_DEFECTS_MAX = 3  # in a row; then the job fails, instead of being retried for ever
_TAKEN_MAX = 1024
_WAITS_MAX = 3  # in a row; then the job's status says what it waits for

log = structlog.get_logger()


class SliceOver(Exception):
    """This slice's time is used up; the next doorbell continues the work."""


class Stopped(Exception):
    """The job no longer runs: it was cancelled, or it ended."""


@dataclass(frozen=True)
class Slice:
    """One slice of work on a job; `go_on` is called before each part of it, with the tokens that it will train on."""

    services: JobServices
    start: Start
    end: float

    async def go_on(self, tokens: int = 0) -> None:
        """Raises Stopped, SliceOver, or QuotaUsedUp, which pauses the job."""
        await self.expect_running()
        at = self.services.clock()
        await self.services.quota.expect(self.start.tenant, at, tokens)
        if at >= self.end:
            raise SliceOver

    async def expect_running(self) -> None:
        """Raises Stopped."""
        if not await control.runs(self.services.store, self.start):
            raise Stopped


Work = Callable[[Folder, Slice, Event], Awaitable[None]]


@dataclass
class Worker:
    """Runs `function`'s work on jobs, in one process. `base_model`: the loaded one; empty if it needs none."""

    function: Function
    services: JobServices
    folders: Folders
    kinds: Sequence[Kind]  # of jobs that it works on
    base_model: str = ""
    slice_s: float = limits.slice_s
    directory: str = ""  # of that model; another name for it
    _busy: set[Start] = field(default_factory=set)
    _again: set[Start] = field(default_factory=set)
    _taken: set[Start] = field(default_factory=set)
    _defects: dict[Start, int] = field(default_factory=dict)
    _waiting: dict[Start, int] = field(default_factory=dict)

    async def answer(self, event: Event, work: Work) -> None:
        """Do the open work. Raises UserError for a poison doorbell, Unavailable and its kin for 'not now'."""
        start = Start.parse(event.subject)
        folder = await self._folder(start)
        if start in self._busy:
            self._again.add(start)  # the running task looks once more before it ends
            return
        self._busy.add(start)
        over = False
        try:
            self._again.add(start)
            while start in self._again and not over:
                self._again.discard(start)
                over = await self._slice(event, folder, work)
        finally:
            self._busy.discard(start)
            self._again.discard(start)
        if over:  # only now: a doorbell that came while the job was busy would have been taken for an earlier one
            await self.services.notifier.go_on(event)

    async def _folder(self, start: Start) -> Folder:
        """Raises InvalidField for a job that this function does not work on: the doorbell is poison, the job is not."""
        try:
            folder = await self.folders.read(start)
        except NotFound as error:  # a Broker would retry a 404
            raise InvalidField("subject", str(start), "a job that was started") from error
        if folder.job.kind not in self.kinds:
            raise InvalidField("kind", folder.job.kind, " or ".join(self.kinds))
        if folder.job.sweep is not None:
            raise InvalidField("subject", str(start), "a job that is no sweep: its trials are")
        if self.base_model and folder.started.base_model not in (self.base_model, self.directory):
            raise InvalidField("model", folder.started.base_model, repr(self.base_model))
        return folder

    async def _slice(self, event: Event, folder: Folder, work: Work) -> bool:
        """True if the slice's time was used up: then there has to be a doorbell for the rest."""
        services, start = self.services, folder.start
        try:
            await self._take_up(folder)
            await work(folder, Slice(services, start, services.clock() + self.slice_s), event)
            self._defects.pop(start, None)
            await self._goes_on(folder)
        except SliceOver:
            return True
        except Stopped:
            self._taken.discard(start)
            await services.store.delete(start.working)
            await outputs.publish_status(services, folder.started)
        except QuotaUsedUp as error:  # the gateway sends the doorbell again once there is more
            log.info("job pauses", job=str(start), reason=str(error))
            await self._note(folder, f"{control.PAUSED}: {error}")
        except UserError as error:
            await self._fail(event, folder, str(error))
        except KnapperError as error:
            await self._waits(folder, error)
            raise
        except Exception as defect:
            times = self._defects[start] = self._defects.get(start, 0) + 1
            log.exception("defect", job=str(start), times=times)
            if times < _DEFECTS_MAX:
                raise KnapperError(f"job {start} met a defect of the server: {defect!r}") from defect
            await self._fail(event, folder, f"failed {times} times by a defect of the server: {defect!r}")
        return False

    async def _take_up(self, folder: Folder) -> None:
        """Record once per job that this function works on it, for `knapper jobs show`."""
        if (start := folder.start) not in self._taken:
            await activity.take_up(self.services.store, start, self.function, self.services.clock())
            await outputs.publish_status(self.services, folder.started)
            if len(self._taken) >= _TAKEN_MAX:
                self._taken.clear()
            self._taken.add(start)

    async def _waits(self, folder: Folder, error: KnapperError) -> None:
        """Publish what the job waits for, once waiting has repeated so often that it will not pass by itself."""
        if not isinstance(error, Unavailable) or isinstance(error, StoreError | NotHolder):
            return
        times = self._waiting[folder.start] = self._waiting.get(folder.start, 0) + 1
        if times == _WAITS_MAX:
            log.error("job waits", job=str(folder.start), reason=str(error))
            await self._note(folder, f"waits: {error}")

    async def _goes_on(self, folder: Folder) -> None:
        if self._waiting.pop(folder.start, 0) >= _WAITS_MAX:
            await self._note(folder, "")

    async def _note(self, folder: Folder, reason: str) -> None:
        if await control.note(self.services.store, folder.start, reason, self.services.clock()):
            await outputs.publish_status(self.services, folder.started)

    async def _fail(self, event: Event, folder: Folder, reason: str) -> None:
        services, start = self.services, folder.start
        self._taken.discard(start)
        if await control.change(services.store, start, "failed", reason, services.clock()):
            log.error("job failed", job=str(start), reason=reason)
            await services.notifier.ring(event, cloudevents.JOB_FAILED, event.source, event.step or 0)
        await services.store.delete(start.working)
        await outputs.publish_status(services, folder.started)
