"""Posts doorbells to train_step for runs with unfinished work, and wakes polls with the commits it streams back.

A lost doorbell costs time and nothing else: the work is in the store, and the poll that waits for it rings again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NoReturn

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
_RETRYABLE = (401, 408, 425, 429)  # 401: it has another function key, which is no fault of the user
_COLD_S = 1.0  # a doorbell without a reply counts as a cold start after this
_NOTICE_EVERY_S = 60.0  # of a cold start: as often as the SDK prints why samples are paused
_SILENCE_S = limits.slice_s + 300.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_SILENCE_S)
_DIRECT = aiohttp.ClientTimeout(total=None, sock_connect=1.0, sock_read=_SILENCE_S)  # a dead pod may just be silent

log = structlog.get_logger()


@dataclass
class _RunState:
    """One run, as this gateway sees it."""

    accepted: int = -1  # the newest operation that passed through here
    ring_again: bool = False  # an operation was accepted since the newest doorbell
    task: asyncio.Task[None] | None = None
    unanswered_since: float | None = None
    refusal: str = ""  # the reason with which train_step refused the newest doorbell
    standing: bool = False  # the refusal stays until an operator acts
    unservable: bool = False  # standing, because the model cannot be served
    notice_due: bool = False  # standing, and no client that waits has seen it yet
    cold_start_noticed_at: float = float("-inf")  # when a client was last told of a cold start
    holder: Claimed | None = None
    service_url: str = ""  # where train_step was last rung as a service
    result_event: asyncio.Event | None = None
    progress: tuple[int, int] = (-1, -1)  # newest accepted and applied operations at the last call of `changed_runs`
    streaming: bool = False  # the response to a doorbell is open, and the holder streams its commits into it

    def refuse(self, reason: str, code: str) -> None:
        self.standing = code in STANDING
        self.notice_due = self.standing and (self.notice_due or reason != self.refusal)
        self.refusal = reason

    def clear_refusal(self) -> None:
        self.refusal, self.standing, self.notice_due = "", False, False


class TrainStepClient:
    """At most one doorbell in flight per run. Where pods have addresses, the run's holder is rung first, then the
    service if the holder is lost.

    `url_of`: where a run's train_step listens. `on_commit` is called for each streamed commit, `on_missing_run` for a
    run that train_step no longer finds. `now`: monotonic seconds.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        unservable_models: UnservableModels,
        results: Results,
        *,
        url_of: Callable[[RunId], Awaitable[str]],
        holder_of: Callable[[RunId], Awaitable[Claimed | None]],
        on_commit: Callable[[RunId, int, Commit], None],
        on_missing_run: Callable[[RunId], None],
        new_id: Callable[[], str],
        now: Callable[[], float],
    ) -> None:
        self._session = session
        self._unservable_models = unservable_models
        self._results = results
        self._url_of = url_of
        self._holder_of = holder_of
        self._on_commit = on_commit
        self._on_missing_run = on_missing_run
        self._new_id = new_id
        self._now = now
        self._states: dict[RunId, _RunState] = {}
        self._cold_start = "no estimate yet"  # as last measured, by stages

    def ring(self, run: RunId, accepted: int = -1) -> None:
        """Tell train_step that the run may have work. Returns at once."""
        state = self._states.setdefault(run, _RunState())
        state.accepted = max(state.accepted, accepted)
        state.ring_again = True
        if state.task is None:
            state.unanswered_since = self._now()
            state.task = asyncio.create_task(self._ring_until_quiet(run, state))

    def result_event(self, run: RunId) -> asyncio.Event:
        """An event that is set when the run has a new result."""
        state = self._states.setdefault(run, _RunState())
        if state.result_event is None or state.result_event.is_set():
            state.result_event = asyncio.Event()
        return state.result_event

    def unfinished(self) -> dict[RunId, tuple[int, int]]:
        """Runs with operations accepted here and not yet applied -> (newest accepted, newest applied)."""
        progress = {run: (state.accepted, self._results.applied(run)) for run, state in self._states.items()}
        return {run: (accepted, applied) for run, (accepted, applied) in progress.items() if accepted > applied}

    def changed_runs(self) -> list[RunId]:
        """Runs with an operation accepted or applied since the last call."""
        changed = []
        for run, state in self._states.items():
            progress = (state.accepted, self._results.applied(run))
            if progress != state.progress:
                state.progress = progress
                changed.append(run)
        return changed

    def runs(self) -> list[RunId]:
        return list(self._states)

    def is_ringing(self, run: RunId) -> bool:
        state = self._states.get(run)
        return state is not None and state.task is not None

    def is_streaming(self, run: RunId) -> bool:
        """Whether the run's holder works on it now and streams its commits here."""
        state = self._states.get(run)
        return state is not None and state.streaming

    def expects_commits(self, run: RunId) -> bool:
        """Whether every commit of the run reaches this gateway, until the stream ends or breaks off.

        A doorbell of a moment ago counts as a stream: its response begins with the commits made before it.
        """
        state = self._states.get(run)
        if state is None:
            return False
        just_rung = state.unanswered_since is not None and self._now() - state.unanswered_since < _COLD_S
        return state.streaming or just_rung

    def queue_state(self, run: RunId) -> tuple[str, str | None]:
        """(queue_state, reason) for clients that wait on the run."""
        state = self._states.get(run)
        applied = self._results.applied(run)
        if state is not None and state.task is None and state.accepted > applied:
            return "paused_capacity", (
                f"operation {applied + 1} has not arrived, and later ones wait for it; if it never does (a cancelled "
                f"request, say), it is skipped "
                f"{limits.sequence_gap_s:.0f} s after they came, or when the session is closed"
            )
        since = state.unanswered_since if state is not None else None
        waited = 0.0 if since is None else self._now() - since
        if state is not None and state.refusal and (state.standing or waited > _COLD_S):
            return (
                "paused_capacity",
                f"train_step cannot go on yet: {state.refusal}; waited {waited:.0f} s, trying again",
            )
        if waited <= _COLD_S:
            return "active", None
        if self._is_serving():
            return "paused_capacity", f"train_step is busy with other runs; waited {waited:.0f} s"
        return "paused_capacity", f"train_step is starting from zero: {waited:.0f} s so far ({self._cold_start})"

    def _is_serving(self) -> bool:
        """Whether train_step works on any run now."""
        return any(state.streaming for state in self._states.values())

    def refusal(self, run: RunId) -> str:
        """Why train_step refuses the run's doorbells, empty if it does not."""
        state = self._states.get(run)
        return state.refusal if state is not None else ""

    def take_notice(self, run: RunId) -> str:
        """A message for one client that waits on the run, or nothing: each is handed out once.

        A standing refusal is one, and a cold start, repeated every minute: by itself the SDK would not print a word of
        either for a quarter of an hour.
        """
        state = self._states.get(run)
        if state is None:
            return ""
        if state.notice_due:
            state.notice_due = False
            return state.refusal
        now, since = self._now(), state.unanswered_since
        if since is None or now - since <= _COLD_S or state.refusal or self._is_serving():
            return ""
        if state.cold_start_noticed_at >= since and now - state.cold_start_noticed_at < _NOTICE_EVERY_S:
            return ""
        state.cold_start_noticed_at = now
        return self.queue_state(run)[1] or ""

    async def forget(self, run: RunId) -> None:
        """Stop ringing for the run, and free its state."""
        state = self._states.pop(run, None)
        self._results.forget(run)
        if state is not None and state.task is not None:
            state.task.cancel()
            await asyncio.gather(state.task, return_exceptions=True)

    async def close(self) -> None:
        for run in self.runs():
            await self.forget(run)

    async def _ring_until_quiet(self, run: RunId, state: _RunState) -> None:
        backoff = Backoff(_BACK_OFF_S, _BACK_OFF_MAX_S)
        try:
            while state.ring_again:
                state.ring_again = False
                try:
                    with traces.span("ring", run=run):
                        more = await self._ring(run, state)
                    state.ring_again = state.ring_again or more
                    backoff.reset()
                except (aiohttp.ClientError, TimeoutError, KnapperError, msgspec.MsgspecError) as error:
                    if isinstance(error, UserError):
                        log.error("train_step refuses the event", run=run, reason=str(error))
                        if isinstance(error, NotFound):
                            self._on_missing_run(run)
                            self.wake(run)
                        return
                    if not backoff.failures and not state.unservable:
                        log.info("train_step does not answer", run=run, reason=str(error) or type(error).__name__)
                    if isinstance(error, KnapperError) and error.code in STANDING and not state.standing:
                        state.refuse(str(error), error.code)  # raised here, before the doorbell went out
                    state.ring_again = True
                    state.holder = None  # another process may hold the run by now
                    await asyncio.sleep(max(backoff.next(), _retry_after_s(error)))
        finally:
            state.task = state.unanswered_since = None

    async def _ring(self, run: RunId, state: _RunState) -> bool:
        """Post one doorbell and read its response to the end; True if the run has more work."""
        if state.unanswered_since is None:
            state.unanswered_since = self._now()
        if state.holder is None:
            state.holder = await self._holder_of(run)
        holder = state.holder
        if holder is None or not holder.address:  # no holder, or one without an address: any process may claim the run
            return await self._post_to_service(run, state, Hint())
        hint = Hint(holder.holder, holder.epoch, "direct")
        try:
            return await self._post(run, state, holder.address, hint)
        except (NotHolder, aiohttp.ClientConnectorError, TimeoutError) as lost:
            log.info("holder lost", run=run, holder=holder.holder, at=holder.address, reason=repr(lost))
        return await self._post_to_service(run, state, replace(hint, way="lost"))

    async def _post_to_service(self, run: RunId, state: _RunState, hint: Hint) -> bool:
        """As `_post`, to the service of the run's model."""
        state.service_url = await self._url_of(run)
        return await self._post(run, state, state.service_url, hint)

    async def _post(self, run: RunId, state: _RunState, url: str, hint: Hint) -> bool:
        """As `_ring`. Raises NotHolder, TimeoutError or aiohttp.ClientError if this address is of no use now."""
        doorbell = replace(cloudevents.doorbell(run, self._new_id(), hint), traceparent=traces.current())
        headers, body = doorbell.encode()
        direct = hint.way == "direct"
        async with asyncio.timeout(limits.holder_timeout_s if direct else None):  # until the response begins
            response = await self._session.post(
                url, headers=headers, data=body, timeout=_DIRECT if direct else _TIMEOUT
            )
        try:
            if response.status != 200:
                await self._raise_refusal(run, state, response, direct)
            return await self._read_commits(run, state, response)
        except aiohttp.SocketTimeoutError as error:
            raise Unavailable(f"the answer paused for {_SILENCE_S:.0f} s") from error
        finally:
            state.streaming = False
            response.close()  # a response read to its end has already returned its connection to the pool

    async def _raise_refusal(
        self, run: RunId, state: _RunState, response: aiohttp.ClientResponse, direct: bool
    ) -> NoReturn:
        """Raises the error of a response that is not 200: NotHolder, UserError or Unavailable."""
        content = await response.read()
        reason, code = _reason(content, response.status), _code(content)
        if direct and (response.status == 502 or code == NotHolder.code):
            raise NotHolder(reason)  # 502: Knative's proxy lives, and the container behind it does not
        if 400 <= response.status < 500 and response.status not in _RETRYABLE:
            raise NotFound(reason) if code == NotFound.code else UserError(reason)
        if code == Corrupt.code:  # a pause and no result: the run continues once the object is restored
            reason += f"; {run} waits until it is restored from a backup; or go on from a checkpoint in a new run"
        state.unservable = code == Unservable.code
        if state.unservable:
            reason = reason.partition(": ")[2]  # a sentence, and no status
            self._unservable_models.add(state.service_url, reason)
        state.refuse(reason, code)
        raise Unavailable(reason, _seconds(response.headers.get("Retry-After", "")))

    async def _read_commits(self, run: RunId, state: _RunState, response: aiohttp.ClientResponse) -> bool:
        """Hand out each commit as it arrives; True if the run has more work. Raises Corrupt if the stream breaks off:
        its commits are durable all the same, and the next doorbell continues from there."""
        done: Done | None = None
        async for frame in cloudevents.decode_frames(response.content.iter_any()):
            match frame:
                case Claimed():
                    self._start_stream(run, state, frame)
                case Committed(n=n, commit=commit):
                    self._results.offer(run, n, commit)
                    self._on_commit(run, n, commit)
                    self.wake(run)
                case Done():
                    done = frame  # the last frame; reading on to the end makes the connection reusable
        if done is not None:
            return done.more
        raise Corrupt("the answer broke off")

    def _start_stream(self, run: RunId, state: _RunState, claim: Claimed) -> None:
        state.holder = claim
        self._unservable_models.remove(state.service_url)
        waited = self._now() - (state.unanswered_since or self._now())
        if waited > _COLD_S:
            self._cold_start = _by_stages(waited, claim)
            metrics.cold_start_seconds.labels("total").observe(waited)
            if 0 < claim.age_s < waited:  # an older process was busy, and not cold
                metrics.cold_start_seconds.labels("pod").observe(waited - claim.age_s)
        state.unanswered_since = None
        state.clear_refusal()
        state.streaming = claim.out >= 0
        self._results.announce(run, claim.out)

    def wake(self, run: RunId) -> None:
        """Wake the polls that wait for a result of the run."""
        state = self._states.get(run)
        if state is not None and state.result_event is not None:
            state.result_event.set()


def _by_stages(waited_s: float, claim: Claimed) -> str:
    """How long a cold start took, and which part of it each stage; an older process was busy, and not cold."""
    if not 0 < claim.age_s < waited_s:
        return f"usually {waited_s:.0f} s"
    stages: dict[str, float] = {name: claim.stages[name] for name in ("import", "weights") if name in claim.stages}
    parts: dict[str, float] = {
        "pod": waited_s - claim.age_s,
        **stages,
        "claim": max(0.0, claim.age_s - sum(stages.values())),
    }
    return f"usually {waited_s:.0f} s: {', '.join(f'{name} {took_s:.1f} s' for name, took_s in parts.items())}"


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else 0.0  # HTTP dates are not supported


def _retry_after_s(error: Exception) -> float:
    """The pause that train_step asks for, if it is longer than the gateway's own longest; else 0.

    It asks so when only an operator can help: rung every few seconds, its pod would never scale to zero.
    """
    after_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
    return after_s if after_s > _BACK_OFF_MAX_S else 0.0


def _code(content: bytes) -> str:
    """The code of an error, empty if it has none."""
    try:
        return msgspec.json.decode(content, type=dict[str, str]).get("code", "")
    except msgspec.MsgspecError:
        return ""


def _reason(content: bytes, status: int) -> str:
    """The status, and the error's detail or the beginning of a body that has none."""
    try:
        return f"{status}: {msgspec.json.decode(content, type=dict[str, str])['detail']}"
    except (msgspec.MsgspecError, KeyError):
        return f"{status}: {content[:200].decode(errors='replace')}"
