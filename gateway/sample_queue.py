"""Samples in flight. In memory only: a client can repeat its request, so a gateway that forgot a sample answers 410.

A free slot goes to the tenant with the fewest samples served, and within it to such a sampling session (`FairShare`);
each session is served in order of arrival.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import aiohttp
import msgspec
import structlog

from gateway import errors, sample_errors
from gateway.tenant_load import TenantLoad
from gateway.unservable import UnservableModels
from knapper import ids, limits
from knapper.concurrency.fair_share import FairShare
from knapper.errors import Gone, KnapperError, TooMany, Unservable
from knapper.ids import SamplerId, SessionId, Tenant, session_of
from knapper.jobs.presence import Presence, silent_as
from knapper.web.backoff import Backoff
from knapper.wire import progress
from knapper.wire.progress import FailedEvent, FinishedEvent, TokenEvent

_IN_FLIGHT_MAX = 256
_BACK_OFF_S, _BACK_OFF_MAX_S = 0.2, 5.0
_DEFECTS_MAX = 3  # a 500 may be a pod that died: only a repeated one becomes the result
_COLD_S = 1.0
_NOTICE_EVERY_S = 60.0
_ASLEEP_S = 30.0  # a function that answered more recently is busy, not cold
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=900.0)
_RETRYABLE = (401, 408, 425, 429, 502, 503, 504)

CLONE_SEQS = 10**9  # each client of a sampling session numbers its requests within its own block
SamplingClient = tuple[SamplerId, int]  # (sampling session, index of the client)

log = structlog.get_logger()


@dataclass(eq=False)
class QueuedSample:
    """One asample request, and its result once `done` is set; a body of None then means that it was cancelled."""

    request_id: str
    address: tuple[SamplerId, int]
    tenant: Tenant
    num_samples: int
    url: str
    call: bytes
    tokens: int = 0  # the most that it may have, where its tenant has a quota of them
    wait_if_unservable: bool = True  # wait for a model that cannot be served now; else fail
    on_token: Callable[[TokenEvent], None] | None = None  # called as tokens are drawn; from the first after a retry
    done: asyncio.Event = field(default_factory=asyncio.Event)
    body: bytes | None = None
    error: KnapperError | None = None
    task: asyncio.Task[None] | None = None
    submitted_at: float = 0.0
    sampler: str = ""  # backend and dtype, as the response reports them
    drawn_by: str = ""  # the weights that drew it, for its answer
    sent_at: float = float("inf")  # when it first went to the sample function
    wait_reported: bool = False  # its client knows that it waits
    refused_since: float | None = None
    refusal: str = ""
    unservable: str = ""  # why its model cannot be served now; empty if it can
    done_at: float = 0.0
    device_s: float = 0.0  # device time, as the response reports it
    number: int = 0  # its place in the order of completion

    @property
    def client(self) -> SamplingClient:
        return self.address[0], self.address[1] // CLONE_SEQS

    @property
    def share_key(self) -> tuple[Tenant, SamplerId]:
        """The key of its fair share."""
        return self.tenant, self.address[0]

    @property
    def failed(self) -> bool:
        """Done without a sample: `body` holds its error, or it was cancelled."""
        return self.body is None or self.error is not None

    @property
    def content_type(self) -> str:
        return "application/json" if self.failed else "application/x-protobuf"

    @property
    def sequence_ids(self) -> list[str]:
        return [f"{self.request_id}:{i}" for i in range(self.num_samples)]


class SampleQueue:
    """`now`: monotonic seconds. `first`: microseconds by the clock; completions are numbered by it, so that a later
    process's numbers are higher.

    `on_success` is called for each sample that succeeds: tenant, session (empty if none), request, response, and the
    device time in seconds.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        unservable_models: UnservableModels,
        new_id: Callable[[], str],
        now: Callable[[], float],
        on_success: Callable[[Tenant, str, bytes, bytes, float], None],
        first: int = 0,
        *,
        on_drawn: Callable[[QueuedSample, bytes], None] = lambda _entry, _response: None,
        presence: Callable[[str], Presence | None] = lambda _url: None,
    ) -> None:
        self._http = http
        self._unservable_models = unservable_models
        self._notices: dict[str, tuple[str, float]] = {}  # session -> (last notice, time)
        self._new_id = new_id
        self._now = now
        self._on_success = on_success
        self._on_drawn, self._presence = on_drawn, presence
        self._entries: dict[str, QueuedSample] = {}
        self._by_address: dict[tuple[SamplerId, int], QueuedSample] = {}
        self._waiting: dict[tuple[Tenant, SamplerId], deque[QueuedSample]] = {}  # none is empty
        self._shares = FairShare()  # in samples, by tenant and sampling session
        self._finished: deque[QueuedSample] = deque()
        self._done: dict[SamplingClient, deque[QueuedSample]] = {}  # finished, for clients that poll for all at once
        self._watchers: dict[SamplingClient, set[asyncio.Event]] = {}
        self._number, self._began_us = first, first - int(now() * 1e6)
        self._answered_at = float("-inf")  # when the sample function last responded
        self._waiting_bytes = self._result_bytes = self._unfinished = self._in_flight = 0
        self.load = TenantLoad()

    @property
    def open(self) -> int:
        """The number of samples that are not done."""
        return self._unfinished

    @property
    def empty(self) -> bool:
        """Whether no sample is kept, waiting, under way or done."""
        return not self._entries

    def active_samplers(self) -> set[SamplerId]:
        """Samplers of samples that are not done."""
        return {entry.address[0] for entry in self._entries.values() if not entry.done.is_set()}

    def known(self, address: tuple[SamplerId, int]) -> QueuedSample | None:
        """The entry of an earlier request with this address."""
        return self._by_address.get(address)

    def submit(
        self,
        address: tuple[SamplerId, int],
        tenant: Tenant,
        num_samples: int,
        url: str,
        call: bytes,
        on_token: Callable[[TokenEvent], None] | None = None,
        *,
        tokens: int = 0,
        wait_if_unservable: bool = True,
    ) -> QueuedSample:
        """Queue the request, or find it queued before. Raises TooMany when the queue is full.

        `on_token` is for a `call` that asks for a stream. `tokens`: the most that it may have. `wait_if_unservable`:
        wait for a model that cannot be served now, instead of failing.
        """
        if (entry := self.known(address)) is not None:
            return entry
        if (
            self._unfinished >= limits.samples_waiting_max
            or self._waiting_bytes + len(call) > limits.samples_waiting_bytes_max
        ):
            raise TooMany(
                f"{self._unfinished} samples wait; allowed: {limits.samples_waiting_max}; send it again later"
            )
        entry = QueuedSample(
            f"s-{self._new_id()}", address, tenant, num_samples, url, call, tokens, wait_if_unservable, on_token,
            submitted_at=self._now(),
        )  # fmt: skip
        self._entries[entry.request_id] = self._by_address[entry.address] = entry
        self._waiting.setdefault(entry.share_key, deque()).append(entry)
        self._shares.join(*entry.share_key)
        self._unfinished += 1
        self.load.add(tenant, num_samples, tokens)
        self._waiting_bytes += len(call)
        self._dispatch()
        return entry

    def find(self, request_id: str, tenant: Tenant) -> QueuedSample | None:
        entry = self._entries.get(request_id)
        return entry if entry is not None and entry.tenant == tenant else None

    def done_after(self, client: SamplingClient, number: int, count_max: int) -> list[QueuedSample]:
        """The client's samples done after `number`, in order. Forgets those up to `number`, which it has seen."""
        done = self._done.get(client, deque())
        while done and done[0].number <= number:
            done.popleft()
        return list(islice(done, count_max))

    @contextmanager
    def watch(self, client: SamplingClient) -> Iterator[asyncio.Event]:
        """An event that is set each time another sample of the client is done."""
        event = asyncio.Event()
        self._watchers.setdefault(client, set()).add(event)
        try:
            yield event
        finally:
            self._watchers[client].discard(event)
            if not self._watchers[client]:
                del self._watchers[client]

    def release(self, request_ids: list[str], tenant: Tenant) -> None:
        """Free the results of these requests: their client has them."""
        for request_id in request_ids:
            entry = self.find(request_id, tenant)
            if entry is not None and entry.done.is_set():
                self._result_bytes -= len(entry.body or b"")
                entry.body = None

    def cancel(self, entry: QueuedSample, reason: KnapperError) -> None:
        """End the sample, in the sample function too."""
        if not entry.done.is_set():
            if entry.task is not None:
                entry.task.cancel()
            else:
                self._waiting[entry.share_key].remove(entry)
                self._close_empty(entry.share_key)
            self._finish(entry, None)
            log.debug("sample cancelled", request=entry.request_id, reason=str(reason))

    def cancel_session(self, session: SessionId, reason: KnapperError) -> None:
        for entry in list(self._entries.values()):
            if session_of(entry.address[0]) == session:
                self.cancel(entry, reason)

    def queue_state(self, entry: QueuedSample) -> tuple[str, str | None]:
        """(queue_state, reason) for the client that waits on the sample."""
        if entry.unservable:
            return "paused_capacity", entry.unservable
        if entry.refused_since is None:
            waited = self._now() - entry.sent_at
            answered_recently = entry.sent_at - self._answered_at < _ASLEEP_S
            if waited <= _COLD_S or answered_recently:
                return "active", None
            return "paused_capacity", f"sample is {silent_as(self._presence(entry.url))}; waited {waited:.0f} s"
        waited = self._now() - entry.refused_since
        if waited <= _COLD_S:
            return "active", None
        return "paused_capacity", f"sample does not answer yet ({entry.refusal}); waited {waited:.0f} s"

    def take_notice(self, entry: QueuedSample) -> str:
        """A message about an unservable model for the sample's session: once a minute, however many samples wait."""
        session, now = session_of(entry.address[0]), self._now()
        last, last_at = self._notices.get(session, ("", 0.0))
        if not entry.unservable or (last == entry.unservable and now - last_at < _NOTICE_EVERY_S):
            return ""
        self._notices = {key: (last, at) for key, (last, at) in self._notices.items() if now - at < _NOTICE_EVERY_S}
        self._notices[session] = (entry.unservable, now)
        return entry.unservable

    def expire(self) -> None:
        """Drop results that their client did not fetch."""
        while self._finished and (
            self._result_bytes > limits.sample_results_bytes_max
            or self._now() - self._finished[0].done_at > limits.sample_results_s
        ):
            entry = self._finished.popleft()
            self._result_bytes -= len(entry.body or b"")
            del self._entries[entry.request_id], self._by_address[entry.address]
            self._forget(entry)

    def _forget(self, entry: QueuedSample) -> None:
        done = self._done.get(entry.client)
        if done is not None:
            if done and done[0] is entry:
                done.popleft()
            if not done:
                del self._done[entry.client]

    async def close(self) -> None:
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for entry in list(self._entries.values()):
            self.cancel(entry, Gone("the gateway stops"))
        await asyncio.gather(*tasks, return_exceptions=True)

    def _dispatch(self) -> None:
        while self._waiting and self._in_flight < _IN_FLIGHT_MAX:
            share = min(self._waiting, key=lambda key: self._shares.rank(*key))
            entry = self._waiting[share].popleft()
            self._shares.serve(*share)
            self._shares.charge(entry.num_samples, *share)
            self._in_flight += 1
            entry.task = asyncio.create_task(self._serve(entry))
            self._close_empty(share)

    def _close_empty(self, share: tuple[Tenant, SamplerId]) -> None:
        if not self._waiting[share]:
            del self._waiting[share]
            self._shares.leave(self._waiting)

    async def _serve(self, entry: QueuedSample) -> None:
        try:
            self._finish(entry, await self._request(entry))
        finally:
            self._in_flight -= 1
            self._dispatch()

    async def _request(self, entry: QueuedSample) -> bytes | KnapperError:
        """The sample as protobuf, or the error. Retries until there is either."""
        backoff, defects = Backoff(_BACK_OFF_S, _BACK_OFF_MAX_S), 0
        while True:
            try:
                entry.sent_at = min(entry.sent_at, self._now())
                status, content = await self._post(entry)
                self._answered_at = self._now()
                if status == 200:
                    self._unservable_models.remove(entry.url)
                    return (
                        content
                        if len(content) <= limits.sample_results_bytes_max
                        else sample_errors.oversized(len(content))
                    )
                reason = f"{status}: {content[:200].decode(errors='replace')}"
                error = sample_errors.decode(status, content)
                entry.unservable = str(error) if error.code == Unservable.code else ""
                if entry.unservable:
                    self._unservable_models.add(entry.url, entry.unservable)
                    if not entry.wait_if_unservable:
                        return error
                if status not in _RETRYABLE:
                    defects += status >= 500
                    if status < 500 or defects >= _DEFECTS_MAX:
                        return error
            except (aiohttp.ClientError, TimeoutError) as lost:
                reason = f"starting from zero: {type(lost).__name__}"
            except KnapperError as error:  # raised here, before anything was sent
                return error
            if entry.refused_since is None:
                entry.refused_since = self._now()
            entry.refusal = reason
            if not backoff.failures and not entry.unservable:
                log.info("sample does not answer", request=entry.request_id, reason=reason)
            await asyncio.sleep(backoff.next())

    async def _post(self, entry: QueuedSample) -> tuple[int, bytes]:
        """(status, content) of one attempt."""
        headers = {"Content-Type": "application/json", "Knapper-Tenant": entry.tenant}  # for its own fair share
        async with self._http.post(entry.url, data=entry.call, headers=headers, timeout=_TIMEOUT) as response:
            entry.device_s = progress.device_s(response.headers.get(progress.DEVICE_S))
            entry.sampler = progress.sampler(response.headers.get(progress.SAMPLER, ""))
            if entry.on_token is None or response.status != 200:
                return response.status, await response.read()
            try:
                async for frame in progress.decode(response.content.iter_any()):
                    match frame:
                        case TokenEvent():
                            entry.on_token(frame)
                        case FinishedEvent(answer=answer, device_s=device_s):
                            entry.device_s = device_s
                            return 200, answer
                        case FailedEvent(status=status):
                            return status, msgspec.json.encode(frame)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("a streamed sample broke off", request=entry.request_id, reason=type(error).__name__)
        return 500, b"the sample function's answer broke off"

    def _finish(self, entry: QueuedSample, result: bytes | KnapperError | None) -> None:
        if entry.done.is_set():
            return
        body = msgspec.json.encode(errors.failure(result)) if isinstance(result, KnapperError) else result
        self._unfinished -= 1
        self.load.remove(entry.tenant, entry.num_samples, entry.tokens)
        self._waiting_bytes -= len(entry.call)
        if isinstance(result, KnapperError):
            entry.error = result
        elif body is not None:
            session = session_of(entry.address[0])
            self._on_success(entry.tenant, session if ids.is_session(session) else "", entry.call, body, entry.device_s)
            self._on_drawn(entry, body)
        entry.call = b""
        entry.body, entry.done_at = body, self._now()
        self._number = max(self._number + 1, self._began_us + int(entry.done_at * 1e6))
        entry.number = self._number
        self._finished.append(entry)
        self._done.setdefault(entry.client, deque()).append(entry)
        for event in self._watchers.get(entry.client, ()):
            event.set()
        self._result_bytes += len(body or b"")
        entry.done.set()
        self.expire()
