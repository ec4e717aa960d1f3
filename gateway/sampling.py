"""Sampling sessions, each bound to immutable weights, and sample requests to them."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, body_decoders
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import ids
from knapper.errors import InvalidField
from knapper.ids import SamplerId, TinkerPath, session_of
from knapper.state.sessions import Sampler
from knapper.wire import sample_requests


async def create_sampling_session(request: Request) -> Response:
    """A session for a base model or a checkpoint. A repeated request gets the same session."""
    gateway, tenant = services_of(request), tenant_of(request)
    settings = sample_requests.decode(await bodies.read(request), sample_requests.CreateSamplingSession)
    session = ids.SessionId((await gateway.lookups.open_session(settings.session_id, tenant)).session)
    base_model, bundle = settings.base_model, ""
    if settings.model_path is not None:
        checkpoint = await gateway.checkpoints.resolve(TinkerPath.parse(settings.model_path, "model_path"), tenant)
        checkpoint.expect_plain()
        base_model, bundle = checkpoint.base_model, checkpoint.bundle
    elif base_model is None:
        raise InvalidField("base_model", None, "a model's name, or model_path: tinker://<run>/<kind>/<name>")
    model = await gateway.lookups.model(base_model)
    if settings.base_model is not None and settings.base_model not in (model.name, model.directory):
        raise InvalidField("base_model", settings.base_model, f"{model.name!r}, that of {settings.model_path}, or none")
    if not model.sampleable:
        raise InvalidField("base_model", base_model, "a model that can be sampled; see get_server_capabilities")
    if settings.model_path is not None:
        await gateway.audit.read(tenant, settings.model_path, "sampling")
    sampler = await gateway.lookups.samplers.create(
        Sampler(
            sampler=ids.make_sampler_id(session, settings.sampling_session_seq_id),
            tenant=tenant,
            base_model=model.name,
            bundle=bundle,
            model_path=settings.model_path or "",
        )
    )
    return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler.sampler})


async def join_sampling_session(request: Request) -> Response:
    """A unique number for one more client of the session, from which it numbers its requests."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = sample_requests.decode(await bodies.read(request), sample_requests.JoinSamplingSession)
    sampler = SamplerId((await gateway.lookups.sampler(query.sampling_session_id, tenant)).sampler)
    counter = await gateway.lookups.samplers.join(sampler)
    return JSONResponse({"type": "join_sampling_session", "client_counter": counter})


async def get_sampler(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    sampler = await gateway.lookups.sampler(request.path_params["sampler_id"], tenant)
    description = {
        "sampler_id": sampler.sampler,
        "base_model": sampler.base_model,
        "model_path": sampler.model_path or None,
    }
    return JSONResponse(description)


async def at_home(request: Request, sampler: SamplerId, body: bytes) -> Response | None:
    """The answer of the gateway that takes the samples of the sampler's session; None if it is this one."""
    gateway, session = services_of(request), session_of(sampler)
    created_at = partial(gateway.lookups.created_at, session, tenant_of(request))
    return await gateway.peers.ask_home(request, session, created_at, body)


async def asample(request: Request) -> Response:
    """A future for a sample. A repeated request gets the same future."""
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    session, seq = await bodies.in_worker(request, sample_requests.address, body)
    sampler = await gateway.lookups.sampler(session, tenant)
    address = (SamplerId(sampler.sampler), seq)
    entry = gateway.sample_queue.known(address)
    if entry is None and (answer := await at_home(request, address[0], body)) is not None:
        return answer
    if entry is None:
        url = gateway.sample_url or (await gateway.lookups.model(sampler.base_model)).sample_url
        seed = int(gateway.new_id()[:12], 16)
        serving = await gateway.lookups.inflight.serving(sampler)
        weights = (serving.base_model, serving.bundle)
        sample = await bodies.in_worker(request, body_decoders.sample_call, body, *weights, seed)
        tokens = 0
        if await gateway.admission.counts_tokens(tenant):
            tokens = sample.tokens_max((await gateway.lookups.model(sampler.base_model)).context)
        await gateway.admission.expect_samples(tenant, sample.num_samples, tokens)
        await gateway.peers.gateways.publish()  # before it is acknowledged: any gateway may be polled for it
        entry = gateway.sample_queue.submit(address, tenant, sample.num_samples, url, sample.call, tokens=tokens)
    return JSONResponse({"request_id": entry.request_id, "sample_sequence_ids": entry.sequence_ids})
