"""Ring train_step for runs with work undone, and let what it answers wake those who wait.

A bell that gets lost costs time and nothing else: the work lies in the store, and whoever polls for it rings again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import aiohttp
import msgspec
import structlog

from gateway.unservable import UnservableModels
from knapper import limits
from knapper.errors import STANDING, Corrupt, KnapperError, NotFound, NotHolder, Unavailable, Unservable, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Claimed, Committed, Done, Hint
from knapper.ids import RunId
from knapper.observability import metrics, traces
from knapper.state.journal.records import Commit
from knapper.state.journal.results import Results
from knapper.web.backoff import Backoff

_BACK_OFF_S, _BACK_OFF_MAX_S = 0.2, 5.0
_LATER = (401, 408, 425, 429)  # 401: it has another key of the functions, which is no fault of the user
_COLD_S = 1.0  # an unanswered bell is a cold start after this
_TELL_AGAIN_S = 60.0  # of a cold start: as often as the SDK prints why samples are paused
_SILENCE_S = limits.slice_s + 300.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_SILENCE_S)
_DIRECT = aiohttp.ClientTimeout(total=None, sock_connect=1.0, sock_read=_SILENCE_S)  # a dead pod may just be silent

log = structlog.get_logger()


@dataclass
class _Line:
    """One run, as this gateway sees it."""

    accepted: int = -1  # the newest operation that passed through here
    again: bool = False  # something was accepted since the newest bell began
    task: asyncio.Task[None] | None = None
    unanswered_since: float | None = None
    trouble: str = ""  # what train_step said when it refused the newest bell
    standing: bool = False  # it will say so until an operator does something
    unservable: bool = False  # of that kind: the model cannot be served
    untold: bool = False  # and nobody who waits knows that yet
    told_at: float = float("-inf")  # when somebody who waits was last told of a cold start
    holder: Claimed | None = None  # as last heard
    service: str = ""  # where train_step was last rung as a service
    wake: asyncio.Event | None = None
    far: tuple[int, int] = (-1, -1)  # newest accepted and answered operations, as `moved` last told
    told: bool = False  # the holder tells of each commit at this moment: the answer to a bell is open

    def meet(self, trouble: str, code: str) -> None:
        """The run cannot go on now; `trouble` says why."""
        self.standing = code in STANDING
        self.untold = self.standing and (self.untold or trouble != self.trouble)
        self.trouble = trouble


class TrainStepClient:
    """At most one bell in flight a run. `url_of` says where a run's train_step listens; `now`: monotonic seconds.

    `told` hears of each commit that a holder tells of; `missing` of a run that train_step does not find any more. Where
    pods have addresses of their own, the run's holder is rung there first, and the service if it is lost.
    """

    def __init__(
        self,
        client: aiohttp.ClientSession,
        refusals: UnservableModels,
        results: Results,
        url_of: Callable[[RunId], Awaitable[str]],
        holder_of: Callable[[RunId], Awaitable[Claimed | None]],
        told: Callable[[RunId, int, Commit], None],
        missing: Callable[[RunId], None],
        new_id: Callable[[], str],
        now: Callable[[], float],
    ) -> None:
        self._client = client
        self._refusals = refusals
        self._results = results
        self._url_of = url_of
        self._holder_of = holder_of
        self._told = told
        self._missing = missing
        self._new_id = new_id
        self._now = now
        self._lines: dict[RunId, _Line] = {}
        self._cold_start_s: float | None = None  # as last measured

    def ring(self, run: RunId, accepted: int = -1) -> None:
        """Work may wait for the run. Returns at once."""
        line = self._lines.setdefault(run, _Line())
        line.accepted = max(line.accepted, accepted)
        line.again = True
        if line.task is None:
            line.unanswered_since = self._now()
            line.task = asyncio.create_task(self._ring_until_quiet(run, line))

    def woken(self, run: RunId) -> asyncio.Event:
        """An event that is set when the run has a new result."""
        line = self._lines.setdefault(run, _Line())
        if line.wake is None or line.wake.is_set():
            line.wake = asyncio.Event()
        return line.wake

    def undone(self) -> dict[RunId, tuple[int, int]]:
        """Runs of which something was accepted here and not yet answered; of each, the newest operations that were."""
        far = {run: (line.accepted, self._results.applied(run)) for run, line in self._lines.items()}
        return {run: (accepted, applied) for run, (accepted, applied) in far.items() if accepted > applied}

    def moved(self) -> list[RunId]:
        """Runs of which anything was accepted or answered since this was asked last."""
        found = []
        for run, line in self._lines.items():
            far = (line.accepted, self._results.applied(run))
            if far != line.far:
                line.far = far
                found.append(run)
        return found

    def runs(self) -> list[RunId]:
        return list(self._lines)

    def ringing(self, run: RunId) -> bool:
        line = self._lines.get(run)
        return line is not None and line.task is not None

    def answered(self, run: RunId) -> bool:
        """Whether the run's holder works on it at this moment, and tells of whatever it commits."""
        line = self._lines.get(run)
        return line is not None and line.told

    def told(self, run: RunId) -> bool:
        """Whether the run's holder tells of whatever it commits, until its answer to the bell ends or breaks off.

        A bell of a moment ago counts as answered: what was committed before it is told at the beginning of its answer.
        """
        line = self._lines.get(run)
        if line is None:
            return False
        just_rung = line.unanswered_since is not None and self._now() - line.unanswered_since < _COLD_S
        return line.told or just_rung

    def queue_state(self, run: RunId) -> tuple[str, str | None]:
        """(queue_state, reason) for whoever waits on the run."""
        line = self._lines.get(run)
        applied = self._results.applied(run)
        if line is not None and line.task is None and line.accepted > applied:
            return "paused_capacity", (
                f"operation {applied + 1} has not arrived, and later ones wait for it; if it never does (a cancelled "
                f"request, say), it is skipped "
                f"{limits.sequence_gap_s:.0f} s after they came, or when the session is closed"
            )
        since = line.unanswered_since if line is not None else None
        waited = 0.0 if since is None else self._now() - since
        if line is not None and line.trouble and (line.standing or waited > _COLD_S):
            return (
                "paused_capacity",
                f"train_step cannot go on yet: {line.trouble}; waited {waited:.0f} s, trying again",
            )
        if waited <= _COLD_S:
            return "active", None
        usually = (
            "how long it takes is not known yet"
            if self._cold_start_s is None
            else f"usually {self._cold_start_s:.0f} s"
        )
        if self._runs_now():
            return "paused_capacity", f"train_step is busy with other runs; waited {waited:.0f} s"
        return "paused_capacity", f"train_step is starting from zero; waited {waited:.0f} s, {usually}"

    def _runs_now(self) -> bool:
        """Whether train_step answers somebody at this moment."""
        return any(line.told for line in self._lines.values())

    def trouble(self, run: RunId) -> str:
        """Why train_step refuses the run's bells, empty if it does not."""
        line = self._lines.get(run)
        return line.trouble if line is not None else ""

    def tell(self, run: RunId) -> str:
        """What whoever waits is to hear at once, or nothing.

        The first one to ask does: of what does not pass by itself, and of a cold start, which is told again once a
        minute. The SDK by itself would not print a word of either for a quarter of an hour.
        """
        line = self._lines.get(run)
        if line is None:
            return ""
        if line.untold:
            line.untold = False
            return line.trouble
        now, since = self._now(), line.unanswered_since
        if since is None or now - since <= _COLD_S or line.trouble or self._runs_now():
            return ""
        if line.told_at >= since and now - line.told_at < _TELL_AGAIN_S:
            return ""
        line.told_at = now
        return self.queue_state(run)[1] or ""

    async def forget(self, run: RunId) -> None:
        """Stop ringing for the run and free what is known of it."""
        line = self._lines.pop(run, None)
        self._results.forget(run)
        if line is not None and line.task is not None:
            line.task.cancel()
            await asyncio.gather(line.task, return_exceptions=True)

    async def close(self) -> None:
        for run in self.runs():
            await self.forget(run)

    async def _ring_until_quiet(self, run: RunId, line: _Line) -> None:
        backoff = Backoff(_BACK_OFF_S, _BACK_OFF_MAX_S)
        try:
            while line.again:
                line.again = False
                try:
                    with traces.span("ring", run=run):
                        more = await self._ring(run, line)
                    line.again = line.again or more
                    backoff.reset()
                except (aiohttp.ClientError, TimeoutError, KnapperError, msgspec.MsgspecError) as error:
                    if isinstance(error, UserError):
                        log.error("train_step refuses the event", run=run, reason=str(error))
                        if isinstance(error, NotFound):
                            self._missing(run)
                            self.wake(run)
                        return
                    if not backoff.failures and not line.unservable:
                        log.info("train_step does not answer", run=run, reason=str(error) or type(error).__name__)
                    if isinstance(error, KnapperError) and error.code in STANDING and not line.standing:
                        line.meet(str(error), error.code)  # we could not even ring for it
                    line.again = True
                    line.holder = None  # it may be another by now
                    await asyncio.sleep(max(backoff.next(), _asked_s(error)))
        finally:
            line.task = line.unanswered_since = None

    async def _ring(self, run: RunId, line: _Line) -> bool:
        """One bell, until its answer ends; True if it should ring again."""
        if line.unanswered_since is None:
            line.unanswered_since = self._now()
        if line.holder is None:
            line.holder = await self._holder_of(run)
        holder = line.holder
        if holder is None or not holder.address:  # nobody, or nobody that can be rung: whoever hears it may have it
            return await self._post_to_service(run, line, Hint())
        hint = Hint(holder.holder, holder.epoch, "direct")
        try:
            return await self._post(run, line, holder.address, hint)
        except (NotHolder, aiohttp.ClientConnectorError, TimeoutError) as lost:
            log.info("holder lost", run=run, holder=holder.holder, at=holder.address, reason=repr(lost))
        return await self._post_to_service(run, line, replace(hint, way="lost"))

    async def _post_to_service(self, run: RunId, line: _Line, hint: Hint) -> bool:
        """As `_post`, to whoever serves the run's model."""
        line.service = await self._url_of(run)
        return await self._post(run, line, line.service, hint)

    async def _post(self, run: RunId, line: _Line, url: str, hint: Hint) -> bool:
        """Raises NotHolder, TimeoutError or aiohttp.ClientError: this address is of no use now. Else as `_ring`."""
        bell = replace(cloudevents.bell(run, self._new_id(), hint), traceparent=traces.current())
        headers, body = bell.encode()
        direct = hint.way == "direct"
        async with asyncio.timeout(limits.holder_timeout_s if direct else None):  # until it begins to answer
            response = await self._client.post(url, headers=headers, data=body, timeout=_DIRECT if direct else _TIMEOUT)
        try:
            return await self._hear(run, line, response, direct)
        except aiohttp.SocketTimeoutError as error:
            raise Unavailable(f"the answer paused for {_SILENCE_S:.0f} s") from error
        finally:
            line.told = False
            response.close()  # one that was read to its end has let its connection go before

    async def _hear(self, run: RunId, line: _Line, response: aiohttp.ClientResponse, direct: bool) -> bool:
        done: Done | None = None
        if response.status != 200:
            content = await response.read()
            said, code = detail(content, response.status), _code(content)
            if direct and (response.status == 502 or code == NotHolder.code):
                raise NotHolder(said)  # 502: Knative's proxy lives, and what it stands before does not
            if 400 <= response.status < 500 and response.status not in _LATER:
                raise NotFound(said) if code == NotFound.code else UserError(said)
            if code == Corrupt.code:  # a pause and no result: what waits goes on once the object is restored
                said += f"; {run} waits until it is restored from a backup; or go on from a checkpoint in a new run"
            line.unservable = code == Unservable.code
            if line.unservable:
                said = said.partition(": ")[2]  # a sentence, and no status
                self._refusals.refused(line.service, said)
            line.meet(said, code)
            raise Unavailable(said, _seconds(response.headers.get("Retry-After", "")))
        async for frame in cloudevents.decode_frames(response.content.iter_any()):
            match frame:
                case Claimed():
                    line.holder = frame
                    self._refusals.answered(line.service)
                    waited = self._now() - (line.unanswered_since or self._now())
                    if waited > _COLD_S:
                        self._cold_start_s = waited
                        metrics.cold_start_seconds.labels("total").observe(waited)
                        if 0 < frame.age_s < waited:  # else it ran before, and this was no start
                            metrics.cold_start_seconds.labels("pod").observe(waited - frame.age_s)
                    line.unanswered_since = None
                    line.trouble, line.standing, line.untold = "", False, False
                    line.told = frame.out >= 0
                    self._results.hear(run, frame.out)
                case Committed(n=n, commit=commit):
                    self._results.offer(run, n, commit)
                    self._told(run, n, commit)
                    self.wake(run)
                case Done():
                    done = frame  # nothing follows, but a connection that was read to its end can be used again
        if done is not None:
            return done.more
        raise Corrupt("the answer broke off")  # what it said is durable all the same; the next bell goes on from there

    def wake(self, run: RunId) -> None:
        line = self._lines.get(run)
        if line is not None and line.wake is not None:
            line.wake.set()


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else 0.0  # a date is not understood


def _asked_s(error: Exception) -> float:
    """For how long train_step wants no bell, if that is longer than the gateway would pause by itself anyway.

    It says so of what cannot pass by itself: asked every few seconds, a pod would never scale to zero meanwhile.
    """
    after_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
    return after_s if after_s > _BACK_OFF_MAX_S else 0.0


def _code(content: bytes) -> str:
    """The code of an error, empty if it has none."""
    try:
        return msgspec.json.decode(content, type=dict[str, str]).get("code", "")
    except msgspec.MsgspecError:
        return ""


def detail(body: bytes, status: int) -> str:
    """What an answer that is no success says for itself."""
    try:
        return f"{status}: {msgspec.json.decode(body, type=dict[str, str])['detail']}"
    except (msgspec.MsgspecError, KeyError):
        return f"{status}: {body[:200].decode(errors='replace')}"
