"""Futures: a poll is held until its result is there, or for half a minute, and then asked to try again."""

import asyncio
from collections.abc import Callable

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, body_decoders, errors
from gateway.sample_queue import QueuedSample
from gateway.sampling import at_home
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper import ids, limits
from knapper.errors import Gone, KnapperError, NotFound, StoreError, Unavailable
from knapper.ids import RunId, SamplerId, Tenant, session_of
from knapper.state import damage
from knapper.state.journal.records import Result
from knapper.wire import requests

_PROTOBUF = "application/x-protobuf"
_WEIGHTS = "Knapper-Weights"  # a header of an answered sample: the weights that drew it
_FIRST_HOLD_S = 1.1  # of a sample: its client learns of a cold start as soon as it counts as one
_PAUSED_HOLD_S = 5.0  # polls of a cold start, or of an operation that does not arrive, return early with the reason
_READ_EVERY_S = 1.0  # polls also read the store: a doorbell may be lost, or another gateway may have rung

log = structlog.get_logger()


async def retrieve_future(request: Request) -> Response:
    """200 with the result (a failure is JSON with `error`), 408 while there is none, 410 for a forgotten sample."""
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    poll = requests.decode(body, requests.RetrieveFuture)
    training = ids.parse_training_request_id(poll.request_id)
    if training is None:
        return await _sample(gateway, poll.request_id, tenant, request, body)
    run, seq = training
    try:
        await gateway.lookups.active_spec(run, tenant)
    except StoreError as error:  # on a 5xx the SDK would repeat the poll at once, and for ever
        log.warning("the store fails under a poll", run=run, reason=str(error))
        await asyncio.sleep(_READ_EVERY_S)
        return _try_again(poll.request_id, "active", None)
    except damage.ERRORS as error:
        return await _damaged(poll.request_id, run, error)
    try:
        result = await _wait(gateway, run, seq, tenant)
    except damage.ERRORS as error:
        return await _damaged(poll.request_id, run, error)
    if isinstance(result, str):
        if seq > gateway.results.applied(run) and await gateway.acceptor.missing(run, seq):
            return JSONResponse(_forgotten(run, seq))
        notice = result or gateway.train_client.refusal(run) or gateway.monitor.take_notice(run)
        return _try_again(poll.request_id, *gateway.train_client.queue_state(run), notice=notice)
    response = await _respond(request, result.body, result.content_type, body_decoders.forward_json)
    if alarm := gateway.monitor.take_notice(run):
        response.headers.update(errors.notice(alarm))
    return response


async def _damaged(request_id: str, run: RunId, error: KnapperError) -> Response:
    """A pause and no result: the run continues once the object is restored."""
    damage.report(error)
    await asyncio.sleep(_READ_EVERY_S)
    reason = f"{error}; {run} waits until then"
    return _try_again(request_id, "paused_capacity", reason, notice=reason)


def _forgotten(run: RunId, seq: int) -> dict[str, str]:
    """The error of an operation that is not stored: it was accepted by a store that has since been rolled back."""
    error = (
        f"operation {seq} of {run} is not in the server's store, and so was never applied to what is there now: its "
        "operator seems to have restored an older backup. Make a new client from the newest checkpoint that is left "
        "(create_training_client_from_state)"
    )
    return {"error": error, "category": "server"}


async def _respond(request: Request, body: bytes, content_type: str, as_json: Callable[[bytes], bytes]) -> Response:
    """Protobuf for clients that accept it, which SDK 0.25 and newer do; the same as JSON for all others."""
    if content_type == _PROTOBUF and _PROTOBUF not in request.headers.get("accept", ""):
        body, content_type = await bodies.in_worker(request, as_json, body), "application/json"
    return Response(body, media_type=content_type)


async def _wait(gateway: Services, run: RunId, seq: int, tenant: Tenant) -> Result | str:
    """The result; or a notice for the client, empty when the poll has been held long enough.

    Raises NotFound once the run has ended.
    """
    train_client = gateway.train_client
    loop = asyncio.get_running_loop()
    began = loop.time()
    checked_doorbell = False
    while True:
        result_event = train_client.result_event(run)  # before the read, so that no result during it is missed
        try:
            if (result := await gateway.result_reader.find(run, seq)) is not None:
                return result
            await gateway.lookups.active_spec(run, tenant)  # cached, unless train_step no longer finds the run
        except StoreError as error:
            log.warning("the store fails under a poll", run=run, reason=str(error))
        if not checked_doorbell and not train_client.is_ringing(run):
            train_client.ring(run, seq)  # the gateway that rang for it may have died
        checked_doorbell = True
        starting = train_client.queue_state(run)[0] != "active" and not train_client.refusal(run)
        remaining_s = began + (_PAUSED_HOLD_S if starting else limits.poll_hold_s) - loop.time()
        if (notice := train_client.take_notice(run)) or remaining_s <= 0:
            return notice
        try:
            async with asyncio.timeout(min(remaining_s, _READ_EVERY_S)):
                await result_event.wait()
        except TimeoutError:
            pass


async def _sample(gateway: Services, request_id: str, tenant: Tenant, request: Request, poll: bytes) -> Response:
    if not request_id.startswith("s-"):
        raise NotFound(f"request {request_id!r} does not exist; allowed: a request_id that this server gave out")
    sample = gateway.sample_queue.find(request_id, tenant)
    if sample is None:
        if (answer := await _at_its_gateway(gateway, request_id, request, poll)) is not None:
            return answer
        raise Gone(f"sample {request_id} is not known any more; send it again (the SDK does so by itself)")
    gateway.heartbeats.record(session_of(sample.address[0]))  # the heartbeats may all go to another gateway
    loop = asyncio.get_running_loop()
    began = loop.time()
    for hold_s in (_FIRST_HOLD_S, _PAUSED_HOLD_S, limits.poll_hold_s):
        if hold_s == _FIRST_HOLD_S and sample.wait_reported:
            continue
        try:
            async with asyncio.timeout(began + hold_s - loop.time()):
                await sample.done.wait()
            break
        except TimeoutError:
            state, notice = gateway.sample_queue.queue_state(sample), gateway.sample_queue.take_notice(sample)
            paused = state[0] != "active" and (notice or not sample.unservable)  # one notice stands for all samples
            if paused or hold_s == limits.poll_hold_s:
                sample.wait_reported = True
                return _try_again(request_id, *state, notice=notice)  # the SDK prints the reason, once a minute
    if sample.body is None:
        raise Gone(f"sample {request_id} is not known any more; send it again (the SDK does so by itself)")
    body = sample.body
    if not sample.failed:
        await gateway.monitor.entered()
    response = await _respond(request, body, sample.content_type, body_decoders.sample_json)
    if sample.drawn_by:
        response.headers[_WEIGHTS] = sample.drawn_by
    return response


async def _at_its_gateway(gateway: Services, request_id: str, request: Request, poll: bytes) -> Response | None:
    """The answer of the gateway that keeps the sample; None if there is none. While that one fails, it may recover."""
    try:
        return await gateway.peers.ask_owner(request, request_id, poll)
    except Unavailable as error:
        log.warning("a sample at another gateway cannot be asked for", request=request_id, reason=str(error))
        await asyncio.sleep(_READ_EVERY_S)
        return _try_again(request_id, "active", None)


async def retrieve_futures(request: Request) -> Response:
    """The samples finished for one client of a sampling session after its cursor; held while there are none.

    Cursors are times by the clock, so that those of an earlier process are all smaller.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    poll = requests.decode(body, requests.RetrieveFutures)
    sampler = await gateway.lookups.sampler(poll.target.sampling_session_id, tenant)
    if (answer := await at_home(request, SamplerId(sampler.sampler), body)) is not None:
        return answer
    client = (SamplerId(sampler.sampler), poll.target.cloned_sampler_id)
    gateway.sample_queue.release(poll.retrieved_request_ids, tenant)
    loop = asyncio.get_running_loop()
    hold_s = limits.poll_hold_s if poll.timeout is None else min(poll.timeout, limits.poll_hold_s)
    until = loop.time() + hold_s
    with gateway.sample_queue.watch(client) as more:
        while (
            not (done := gateway.sample_queue.done_after(client, poll.prev_cursor, limits.futures_listed_max))
            and (remaining_s := until - loop.time()) > 0
        ):
            more.clear()
            try:
                async with asyncio.timeout(remaining_s):
                    await more.wait()
            except TimeoutError:
                pass
    cursor = max([poll.prev_cursor, *(sample.number for sample in done)])
    return JSONResponse({"completions": [_completion(sample) for sample in done], "cursor": cursor})


def _completion(sample: QueuedSample) -> dict[str, str | int]:
    """Without a failure's reason or a sample's payload, which clients fetch with retrieve_future."""
    if sample.failed:
        return {"state": "failed", "request_id": sample.request_id}
    size = len(sample.body or b"")
    return {"state": "finished", "request_id": sample.request_id, "response_payload_uncompressed_size": size}


def _try_again(request_id: str, queue_state: str, reason: str | None, notice: str = "") -> Response:
    """408, which clients repeat at once and in silence, except for a notice; a 200 would print a warning each poll."""
    body = {"type": "try_again", "request_id": request_id, "queue_state": queue_state, "queue_state_reason": reason}
    return JSONResponse(body, status_code=408, headers=errors.notice(notice) if notice else None)


async def cancel_future(request: Request) -> Response:
    """Ends a sample that its client no longer needs. Training operations are in the journal, and stay."""
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    cancellation = requests.decode(body, requests.CancelFuture)
    sample = gateway.sample_queue.find(cancellation.request_id, tenant)
    if sample is not None:
        gateway.sample_queue.cancel(sample, Gone(f"sample {cancellation.request_id} was cancelled"))
    else:
        await gateway.peers.ask_owner(request, cancellation.request_id, body)
    return JSONResponse({"status": "ok"})
