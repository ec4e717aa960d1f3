"""Promises kept: a poll is held until its result is there, or for half a minute, and then asked to come again."""

import asyncio
from collections.abc import Callable

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, body_decoders, errors
from gateway.sample_queue import QueuedSample
from gateway.services import Services, parts
from gateway.tenants import tenant_of
from knapper import ids, limits
from knapper.errors import Gone, KnapperError, NotFound, StoreError
from knapper.ids import RunId, SamplerId, Tenant
from knapper.state import damage
from knapper.state.journal.records import Result
from knapper.wire import requests

_PROTOBUF = "application/x-protobuf"
_FIRST_HOLD_S = 1.1  # of a sample: whoever waits for a cold start hears so when it is known for one
_PAUSED_HOLD_S = 5.0  # whoever waits for a cold start, or for an operation that does not come, hears so early
_LOOK_S = 1.0  # a poll that nobody wakes looks into the store so often: another gateway's results, a lost bell

log = structlog.get_logger()


async def retrieve_future(request: Request) -> Response:
    """200 with the result (a failure is JSON with `error`), 408 while there is none, 410 for a forgotten sample."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.RetrieveFuture)
    training = ids.parse_training_request_id(asked.request_id)
    if training is None:
        return await _sample(gateway, asked.request_id, tenant, request)
    run, seq = training
    try:
        await gateway.records.living(run, tenant)
    except StoreError as error:  # the SDK repeats a poll that got a 5xx at once, and for ever
        log.warning("the store fails under a poll", run=run, reason=str(error))
        await asyncio.sleep(_LOOK_S)
        return _try_again(asked.request_id, "active", None)
    except damage.ERRORS as error:
        return await _damaged(asked.request_id, run, error)
    try:
        result = await _wait(gateway, run, seq, tenant)
    except damage.ERRORS as error:
        return await _damaged(asked.request_id, run, error)
    if isinstance(result, str):
        if seq > gateway.results.applied(run) and await gateway.acceptor.missing(run, seq):
            return JSONResponse(_forgotten(run, seq))
        notice = result or gateway.bells.trouble(run)
        return _try_again(asked.request_id, *gateway.bells.queue_state(run), notice=notice)
    return await _answer(request, result.body, result.content_type, body_decoders.forward_json)


async def _damaged(request_id: str, run: RunId, error: KnapperError) -> Response:
    """A pause and no result: what waits goes on once the object is restored."""
    damage.tell(error)
    await asyncio.sleep(_LOOK_S)
    reason = f"{error}; {run} waits until then"
    return _try_again(request_id, "paused_capacity", reason, notice=reason)


def _forgotten(run: RunId, seq: int) -> dict[str, str]:
    """Of an operation that is not stored: it was promised by a store that was put back to an earlier state."""
    error = (
        f"operation {seq} of {run} is not in the server's store, and so was never applied to what is there now: its "
        "operator seems to have restored an older backup. Make a new client from the newest checkpoint that is left "
        "(create_training_client_from_state)"
    )
    return {"error": error, "category": "server"}


async def _answer(request: Request, body: bytes, content_type: str, as_json: Callable[[bytes], bytes]) -> Response:
    """Protobuf for those who accept it, which SDK 0.25 and newer do; the same as JSON for all others."""
    if content_type == _PROTOBUF and _PROTOBUF not in request.headers.get("accept", ""):
        body, content_type = await bodies.computed(request, as_json, body), "application/json"
    return Response(body, media_type=content_type)


async def _wait(gateway: Services, run: RunId, seq: int, tenant: Tenant) -> Result | str:
    """The answer; or what is to be told without one, empty when the poll has just been held long enough.

    Raises NotFound once the run has ended.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    rang = False
    while True:
        woken = gateway.bells.woken(run)  # taken before looking, so that nothing that comes while we look is missed
        try:
            if (result := await gateway.looks.find(run, seq)) is not None:
                return result
            await gateway.records.living(run, tenant)  # asks only if the run was missing meanwhile
        except StoreError as error:
            log.warning("the store fails under a poll", run=run, reason=str(error))
        if not rang and not gateway.bells.ringing(run):
            gateway.bells.ring(run, seq)  # whoever rang for it may have died since
        rang = True
        starting = gateway.bells.queue_state(run)[0] != "active" and not gateway.bells.trouble(run)
        left = began + (_PAUSED_HOLD_S if starting else limits.poll_hold_s) - loop.time()
        if (notice := gateway.bells.tell(run)) or left <= 0:
            return notice
        try:
            await asyncio.wait_for(woken.wait(), min(left, _LOOK_S))
        except TimeoutError:
            pass


async def _sample(gateway: Services, request_id: str, tenant: Tenant, request: Request) -> Response:
    if not request_id.startswith("s-"):
        raise NotFound(f"request {request_id!r} does not exist; allowed: a request_id that this server gave out")
    entry = gateway.samples.find(request_id, tenant)
    if entry is None:
        raise Gone(f"sample {request_id} is not known any more; send it again (the SDK does so by itself)")
    loop = asyncio.get_running_loop()
    began = loop.time()
    for hold_s in (_FIRST_HOLD_S, _PAUSED_HOLD_S, limits.poll_hold_s):
        if hold_s == _FIRST_HOLD_S and entry.told:
            continue
        try:
            await asyncio.wait_for(entry.done.wait(), began + hold_s - loop.time())
            break
        except TimeoutError:
            state, notice = gateway.samples.queue_state(entry), gateway.samples.tell(entry)
            waits = state[0] != "active" and (notice or not entry.unservable)  # of that, one is told for all
            if waits or hold_s == limits.poll_hold_s:
                entry.told = True
                return _try_again(request_id, *state, notice=notice)  # the SDK prints the reason, once a minute
    if entry.body is None:
        raise Gone(f"sample {request_id} is not known any more; send it again (the SDK does so by itself)")
    return await _answer(request, entry.body, entry.content_type, body_decoders.sample_json)


async def retrieve_futures(request: Request) -> Response:
    """Everything that was done for one client of a sampling session after its cursor; held while there is nothing.

    Cursors are this process's own: they go on from the clock, so that those of an earlier one are all behind them.
    """
    gateway, tenant = parts(request), tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.RetrieveFutures)
    sampler = await gateway.records.sampler(asked.target.sampling_session_id, tenant)
    client = (SamplerId(sampler.sampler), asked.target.cloned_sampler_id)
    gateway.samples.release(asked.retrieved_request_ids, tenant)
    loop = asyncio.get_running_loop()
    hold_s = limits.poll_hold_s if asked.timeout is None else min(asked.timeout, limits.poll_hold_s)
    until = loop.time() + hold_s
    with gateway.samples.watch(client) as more:
        while (
            not (done := gateway.samples.done_after(client, asked.prev_cursor, limits.futures_listed_max))
            and (left := until - loop.time()) > 0
        ):
            more.clear()
            try:
                await asyncio.wait_for(more.wait(), left)
            except TimeoutError:
                pass
    cursor = max([asked.prev_cursor, *(entry.number for entry in done)])
    return JSONResponse({"completions": [_completion(entry) for entry in done], "cursor": cursor})


def _completion(entry: QueuedSample) -> dict[str, str | int]:
    """A failure's reason, and a sample's payload, are fetched with retrieve_future."""
    if entry.failed:
        return {"state": "failed", "request_id": entry.request_id}
    size = len(entry.body or b"")
    return {"state": "finished", "request_id": entry.request_id, "response_payload_uncompressed_size": size}


def _try_again(request_id: str, queue_state: str, reason: str | None, notice: str = "") -> Response:
    """408, which clients repeat at once and in silence (a 200 would print a warning a poll), but for a notice."""
    body = {"type": "try_again", "request_id": request_id, "queue_state": queue_state, "queue_state_reason": reason}
    return JSONResponse(body, status_code=408, headers=errors.notice(notice) if notice else None)


async def cancel_future(request: Request) -> Response:
    """Ends a sample that nobody waits for. Training operations are in the journal, and stay."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.CancelFuture)
    entry = gateway.samples.find(asked.request_id, tenant)
    if entry is not None:
        gateway.samples.cancel(entry, Gone(f"sample {asked.request_id} was cancelled"))
    return JSONResponse({"status": "ok"})
