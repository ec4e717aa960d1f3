"""Samples in flight. In memory only: a sample can be asked for again, so a gateway that forgot one answers 410.

A free place goes to the tenant that was served least, there to the sampling session that was, by samples (`FairShare`);
a session is served in order of arrival.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import aiohttp
import msgspec
import structlog

from gateway import errors
from gateway.unservable import UnservableModels
from knapper import ids, limits
from knapper.concurrency.fair_share import FairShare
from knapper.errors import Gone, KnapperError, Told, TooLarge, TooMany, Unservable
from knapper.ids import SamplerId, SessionId, Tenant, session_of
from knapper.web.backoff import Backoff
from knapper.wire import progress
from knapper.wire.progress import FailedEvent, FinishedEvent, TokenEvent

_IN_FLIGHT_MAX = 256
_BACK_OFF_S, _BACK_OFF_MAX_S = 0.2, 5.0
_DEFECTS_MAX = 3  # a 500 may be a pod that died: its reply becomes the result only when it comes again
_COLD_S = 1.0
_TOLD_S = 60.0
_ASLEEP_S = 30.0  # a function that answered less long ago is no cold start, whatever it takes
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=900.0)
_LATER = (401, 408, 425, 429, 502, 503, 504)

CLONE_SEQS = 10**9  # each client of a sampling session counts its requests in a block of its own
SamplingClient = tuple[SamplerId, int]  # (sampling session, which client of it)

log = structlog.get_logger()


@dataclass(eq=False)
class QueuedSample:
    """One asample request, and its result once `done` is set; a body of None means that it was cancelled."""

    request_id: str
    address: tuple[SamplerId, int]
    tenant: Tenant
    num_samples: int
    url: str
    call: bytes
    patient: bool = True  # it waits for a model that cannot be served now; else it fails with that
    listen: Callable[[TokenEvent], None] | None = (
        None  # hears tokens as they are drawn, again from the first after a break
    )
    done: asyncio.Event = field(default_factory=asyncio.Event)
    body: bytes | None = None
    error: KnapperError | None = None
    task: asyncio.Task[None] | None = None
    asked_at: float = float("inf")  # when it went to the sample function
    told: bool = False  # whoever waits for it knows that it waits
    refused_since: float | None = None
    refusal: str = ""
    unservable: str = ""  # why its model cannot be served now
    done_at: float = 0.0
    device_s: float = 0.0  # what the answer says that it took
    number: int = 0  # once done: one above that of whatever was done before it

    @property
    def client(self) -> SamplingClient:
        return self.address[0], self.address[1] // CLONE_SEQS

    @property
    def share(self) -> tuple[Tenant, SamplerId]:
        """Out of whose share it is served."""
        return self.tenant, self.address[0]

    @property
    def failed(self) -> bool:
        """Done without a sample: its error is in `body`, or it was cancelled."""
        return self.body is None or self.error is not None

    @property
    def content_type(self) -> str:
        return "application/json" if self.failed else "application/x-protobuf"

    @property
    def sequence_ids(self) -> list[str]:
        return [f"{self.request_id}:{i}" for i in range(self.num_samples)]


class SampleQueue:
    """`now`: monotonic seconds. `first`: what is done gets numbers above it, so that a later process's are higher.

    `count` hears of each sample that succeeds: tenant, session if it has one, the request, the answer, and the seconds
    of the device.
    """

    def __init__(
        self,
        client: aiohttp.ClientSession,
        refusals: UnservableModels,
        new_id: Callable[[], str],
        now: Callable[[], float],
        count: Callable[[Tenant, str, bytes, bytes, float], None],
        first: int = 0,
    ) -> None:
        self._client = client
        self._refusals = refusals
        self._told: dict[str, tuple[str, float]] = {}  # of sessions: what they were told last of such a model, and when
        self._new_id = new_id
        self._now = now
        self._count = count
        self._entries: dict[str, QueuedSample] = {}
        self._by_address: dict[tuple[SamplerId, int], QueuedSample] = {}
        self._waiting: dict[tuple[Tenant, SamplerId], deque[QueuedSample]] = {}  # none is empty
        self._shares = FairShare()  # in samples, by tenant and sampling session
        self._finished: deque[QueuedSample] = deque()
        self._done: dict[
            SamplingClient, deque[QueuedSample]
        ] = {}  # finished and not yet told to a client that asks for all at once
        self._watching: dict[SamplingClient, set[asyncio.Event]] = {}
        self._number = first
        self._answered_at = float("-inf")  # when the sample function last said anything
        self._waiting_bytes = self._kept_bytes = self._unfinished = self._in_flight = 0

    @property
    def open(self) -> int:
        """Samples that are asked for and not done."""
        return self._unfinished

    def sampled_now(self) -> set[SamplerId]:
        """Samplers of samples that are not done."""
        return {entry.address[0] for entry in self._entries.values() if not entry.done.is_set()}

    def known(self, address: tuple[SamplerId, int]) -> QueuedSample | None:
        """The entry of a request that came before."""
        return self._by_address.get(address)

    def submit(
        self,
        address: tuple[SamplerId, int],
        tenant: Tenant,
        num_samples: int,
        url: str,
        call: bytes,
        listen: Callable[[TokenEvent], None] | None = None,
        *,
        patient: bool = True,
    ) -> QueuedSample:
        """Take the request on, or find it taken on before. Raises TooMany when the queue is full.

        `listen` goes with a `call` that asks for a stream. `patient`: it waits for a model that cannot be served now.
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
            f"s-{self._new_id()}", address, tenant, num_samples, url, call, patient=patient, listen=listen
        )
        self._entries[entry.request_id] = self._by_address[entry.address] = entry
        self._waiting.setdefault(entry.share, deque()).append(entry)
        self._shares.join(*entry.share)
        self._unfinished += 1
        self._waiting_bytes += len(call)
        self._dispatch()
        return entry

    def find(self, request_id: str, tenant: Tenant) -> QueuedSample | None:
        entry = self._entries.get(request_id)
        return entry if entry is not None and entry.tenant == tenant else None

    def done_after(self, client: SamplingClient, number: int, most: int) -> list[QueuedSample]:
        """What was done for the client after `number`, in order, at most so many; what was before is not told again."""
        done = self._done.get(client, deque())
        while done and done[0].number <= number:
            done.popleft()
        return list(islice(done, most))

    @contextmanager
    def watch(self, client: SamplingClient) -> Iterator[asyncio.Event]:
        """An event that is set, inside, each time that something more is done for the client."""
        event = asyncio.Event()
        self._watching.setdefault(client, set()).add(event)
        try:
            yield event
        finally:
            self._watching[client].discard(event)
            if not self._watching[client]:
                del self._watching[client]

    def release(self, request_ids: list[str], tenant: Tenant) -> None:
        """Their results were fetched for good, and need to be kept no longer."""
        for request_id in request_ids:
            entry = self.find(request_id, tenant)
            if entry is not None and entry.done.is_set():
                self._kept_bytes -= len(entry.body or b"")
                entry.body = None

    def cancel(self, entry: QueuedSample, why: KnapperError) -> None:
        """End it, upstream too."""
        if not entry.done.is_set():
            if entry.task is not None:
                entry.task.cancel()
            else:
                self._waiting[entry.share].remove(entry)
                self._close_empty(entry.share)
            self._finish(entry, None)
            log.debug("sample cancelled", request=entry.request_id, reason=str(why))

    def cancel_session(self, session: SessionId, why: KnapperError) -> None:
        for entry in list(self._entries.values()):
            if session_of(entry.address[0]) == session:
                self.cancel(entry, why)

    def queue_state(self, entry: QueuedSample) -> tuple[str, str | None]:
        """(queue_state, reason) for whoever waits on the sample."""
        if entry.unservable:
            return "paused_capacity", entry.unservable
        if entry.refused_since is None:
            waited = self._now() - entry.asked_at
            answered_lately = entry.asked_at - self._answered_at < _ASLEEP_S
            if waited <= _COLD_S or answered_lately:
                return "active", None
            return "paused_capacity", f"sample is starting from zero, or busy; waited {waited:.0f} s"
        waited = self._now() - entry.refused_since
        if waited <= _COLD_S:
            return "active", None
        return "paused_capacity", f"sample does not answer yet ({entry.refusal}); waited {waited:.0f} s"

    def tell(self, entry: QueuedSample) -> str:
        """What the user of the sample's session is to hear of its model now: once a minute, however many wait."""
        session, now = session_of(entry.address[0]), self._now()
        told, at = self._told.get(session, ("", 0.0))
        if not entry.unservable or (told == entry.unservable and now - at < _TOLD_S):
            return ""
        self._told = {key: each for key, each in self._told.items() if now - each[1] < _TOLD_S}
        self._told[session] = (entry.unservable, now)
        return entry.unservable

    def expire(self) -> None:
        """Forget results that nobody fetched."""
        while self._finished and (
            self._kept_bytes > limits.sample_results_bytes_max
            or self._now() - self._finished[0].done_at > limits.sample_results_s
        ):
            entry = self._finished.popleft()
            self._kept_bytes -= len(entry.body or b"")
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
            self._finish(entry, await self._ask(entry))
        finally:
            self._in_flight -= 1
            self._dispatch()

    async def _ask(self, entry: QueuedSample) -> bytes | KnapperError:
        """The sample as protobuf, or why there is none. Goes on until there is one or the other."""
        backoff, defects = Backoff(_BACK_OFF_S, _BACK_OFF_MAX_S), 0
        while True:
            try:
                entry.asked_at = min(entry.asked_at, self._now())
                status, content = await self._post(entry)
                self._answered_at = self._now()
                if status == 200:
                    self._refusals.answered(entry.url)
                    return content if len(content) <= limits.sample_results_bytes_max else _oversized(len(content))
                reason = f"{status}: {content[:200].decode(errors='replace')}"
                told = _told(status, content)
                entry.unservable = str(told) if told.code == Unservable.code else ""
                if entry.unservable:
                    self._refusals.refused(entry.url, entry.unservable)
                    if not entry.patient:
                        return told
                if status not in _LATER:
                    defects += status >= 500
                    if status < 500 or defects >= _DEFECTS_MAX:
                        return told
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"starting from zero: {type(error).__name__}"
            if entry.refused_since is None:
                entry.refused_since = self._now()
            entry.refusal = reason
            if not backoff.failures and not entry.unservable:
                log.info("sample does not answer", request=entry.request_id, reason=reason)
            await asyncio.sleep(backoff.next())

    async def _post(self, entry: QueuedSample) -> tuple[int, bytes]:
        """(status, content) of one attempt."""
        headers = {"Content-Type": "application/json", "Knapper-Tenant": entry.tenant}  # whose turn it takes
        async with self._client.post(entry.url, data=entry.call, headers=headers, timeout=_TIMEOUT) as response:
            entry.device_s = progress.device_s(response.headers.get(progress.DEVICE_S))
            if entry.listen is None or response.status != 200:
                return response.status, await response.read()
            try:
                async for frame in progress.decode(response.content.iter_any()):
                    match frame:
                        case TokenEvent():
                            entry.listen(frame)
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
        self._waiting_bytes -= len(entry.call)
        if isinstance(result, KnapperError):
            entry.error = result
        elif body is not None:
            session = session_of(entry.address[0])
            self._count(entry.tenant, session if ids.is_session(session) else "", entry.call, body, entry.device_s)
        entry.call = b""
        entry.body, entry.done_at = body, self._now()
        self._number += 1
        entry.number = self._number
        self._finished.append(entry)
        self._done.setdefault(entry.client, deque()).append(entry)
        for event in self._watching.get(entry.client, ()):
            event.set()
        self._kept_bytes += len(body or b"")
        entry.done.set()
        self.expire()


def _oversized(size: int) -> TooLarge:
    """Told in place of an answer that could not be kept until it is fetched, and would be asked for again and again."""
    return TooLarge(
        f"the answer has {size} bytes; allowed: {limits.sample_results_bytes_max}. "
        f"Ask for fewer samples or alternatives at once"
    )


class _Sent(msgspec.Struct):
    """What the sample function says of an error; nothing of it, where something between says it."""

    detail: str = ""
    code: str = KnapperError.code
    category: Literal["", "user", "server"] = ""
    field: str | None = None


def _told(status: int, content: bytes) -> Told:
    """The error of the sample function."""
    try:
        sent = msgspec.json.decode(content, type=_Sent)
    except msgspec.MsgspecError:
        sent = _Sent()
    category = sent.category or ("user" if status < 500 else "server")
    return Told(sent.detail or f"the sample function answered {status}", sent.code, status, category, sent.field)
