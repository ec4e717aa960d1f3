"""Sampling sessions, each bound to weights that never change, and requests for samples from them."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, body_decoders
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper import ids
from knapper.errors import InvalidField
from knapper.ids import SamplerId, TinkerPath
from knapper.state.sessions import Sampler
from knapper.wire import sample_requests


async def create_sampling_session(request: Request) -> Response:
    """Of a base model, or of a checkpoint. A repetition answers the same session."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = sample_requests.decode(await bodies.read(request), sample_requests.CreateSamplingSession)
    session = ids.SessionId((await gateway.records.open_session(asked.session_id, tenant)).session)
    base_model, bundle = asked.base_model, ""
    if asked.model_path is not None:
        checkpoint = await gateway.checkpoints.resolve(TinkerPath.parse(asked.model_path, "model_path"), tenant)
        checkpoint.expect_plain()
        base_model, bundle = checkpoint.base_model, checkpoint.bundle
    elif base_model is None:
        raise InvalidField("base_model", None, "a model's name, or model_path: tinker://<run>/<kind>/<name>")
    model = await gateway.records.model(base_model)
    if asked.base_model is not None and asked.base_model not in (model.name, model.directory):
        raise InvalidField("base_model", asked.base_model, f"{model.name!r}, that of {asked.model_path}, or none")
    if not model.sampleable:
        raise InvalidField("base_model", base_model, "a model that can be sampled; see get_server_capabilities")
    if asked.model_path is not None:
        await gateway.audit.read(tenant, asked.model_path, "sampling")
    sampler = await gateway.records.samplers.create(
        Sampler(
            sampler=ids.make_sampler_id(session, asked.sampling_session_seq_id),
            tenant=tenant,
            base_model=model.name,
            bundle=bundle,
            model_path=asked.model_path or "",
        )
    )
    return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler.sampler})


async def join_sampling_session(request: Request) -> Response:
    """A number of its own for one more client of the session, from which it counts its requests."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = sample_requests.decode(await bodies.read(request), sample_requests.JoinSamplingSession)
    sampler = SamplerId((await gateway.records.sampler(asked.sampling_session_id, tenant)).sampler)
    counter = await gateway.records.samplers.join(sampler)
    return JSONResponse({"type": "join_sampling_session", "client_counter": counter})


async def get_sampler(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    sampler = await gateway.records.sampler(request.path_params["sampler_id"], tenant)
    answer = {
        "sampler_id": sampler.sampler,
        "base_model": sampler.base_model,
        "model_path": sampler.model_path or None,
    }
    return JSONResponse(answer)


async def asample(request: Request) -> Response:
    """The promise of a sample. A repetition gets the same promise."""
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    session, seq = await bodies.computed(request, sample_requests.address, body)
    sampler = await gateway.records.sampler(session, tenant)
    address = (SamplerId(sampler.sampler), seq)
    entry = gateway.samples.known(address)
    if entry is None:
        url = gateway.sample_url or (await gateway.records.model(sampler.base_model)).sample_url
        seed = int(gateway.new_id()[:12], 16)
        serving = await gateway.records.inflight.serving(sampler)
        given = (serving.base_model, serving.bundle, seed)
        num_samples, call = await bodies.computed(request, body_decoders.sample_call, body, *given)
        entry = gateway.samples.submit(address, tenant, num_samples, url, call)
    return JSONResponse({"request_id": entry.request_id, "sample_sequence_ids": entry.sequence_ids})
