"""Training runs and their operations. Each is durable before its client gets the future; none is computed here."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, body_decoders
from gateway.body_decoders import DecodedOperation, DecodedRequest, RefusedRequest
from gateway.diagnostics.monitor import Accepted
from gateway.services import Services, services_of
from gateway.tenants import client_on_this_machine, tenant_of
from knapper import ids, limits
from knapper.errors import InvalidField, QuotaReached, TooLarge, TooMany, UserError
from knapper.ids import RunId, Tenant, TinkerPath
from knapper.state.journal import bundles
from knapper.state.journal.accept import pack
from knapper.state.journal.records import SAVES, Creation, Kind, Spec
from knapper.state.model_record import ModelRecord
from knapper.wire import requests, scan

_ALPHA = 32.0  # the protocol has no alpha: the scale of an adapter is alpha / rank
_OPTIMIZER_PART = "optimizer.safetensors"

Sequenced = TypeVar(
    "Sequenced",
    requests.OptimStep,
    requests.SaveWeights,
    requests.SaveWeightsForSampler,
    requests.SaveWeightsExternal,
)


# ---- creating runs


async def create_model(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    settings = requests.decode(body, requests.CreateModel)
    run, lora = settings.run(), settings.lora()
    await gateway.lookups.open_session(settings.session_id, tenant)
    model = await gateway.lookups.model(settings.base_model)
    if not model.trainable:
        raise InvalidField(
            "base_model", settings.base_model, "a model that can be trained; see get_server_capabilities"
        )
    await gateway.admission.expect_rank(tenant, lora.rank)
    spec = Spec(
        run=run,
        tenant=tenant,
        base_model=model.name,
        rank=lora.rank,
        alpha=_ALPHA,
        seed=lora.seed if lora.seed is not None else _seed_of(run),
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
        # train_unembed is on by default, so it expresses a wish only if the other two are off.
        keep_tied=lora.train_attn or lora.train_mlp,
        user_metadata_json=settings.user_metadata_json(),
    )
    return await _create(gateway, tenant, Creation(spec=spec), body)


async def load_weights(request: Request) -> Response:
    """Load a checkpoint into a run, as one of its operations; or create a run of the checkpoint's shape from it."""
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    load = await _decode_or_reject(gateway, tenant, body, requests.LoadWeights)
    if isinstance(load, Response):
        return load
    try:
        run = load.creates()
    except UserError as error:
        return await _reject(gateway, tenant, RefusedRequest(error, pack(body), body_decoders.address(body)))
    if run is None:
        operation = DecodedOperation(load.model_id or "", load.seq_id or 0, pack(body), optimizer=load.optimizer)
        return await _accept(gateway, tenant, "load_weights", operation)
    await gateway.lookups.open_session(load.session(), tenant)
    checkpoint = await gateway.checkpoints.resolve(TinkerPath.parse(load.path), tenant)
    checkpoint.expect_plain()
    model = await gateway.lookups.model(checkpoint.base_model)
    if load.base_model is not None and load.base_model not in (model.name, model.directory):
        raise InvalidField("base_model", load.base_model, f"{model.name!r}, on which {load.path} was trained, or none")
    index = await bundles.read_index(gateway.store, checkpoint.bundle)
    if index is None:
        raise UserError(f"checkpoint {load.path} has no files any more; load another one")
    if load.optimizer and not any(part.name == _OPTIMIZER_PART for part in index.parts):
        raise InvalidField(
            "path", load.path, "a checkpoint with optimizer state (made by save_state), since optimizer is true",
            "Use create_training_client_from_state, which takes the weights alone",
        )  # fmt: skip
    await gateway.admission.expect_rank(tenant, index.spec.rank)
    metadata = load.user_metadata_json()
    spec = msgspec.structs.replace(index.spec, run=run, tenant=tenant, user_metadata_json=metadata)
    creation = Creation(spec=spec, source=checkpoint.bundle, with_optimizer=load.optimizer)
    await gateway.audit.read(tenant, checkpoint.path, "training")
    return await _create(gateway, tenant, creation, body)


async def _create(gateway: Services, tenant: Tenant, creation: Creation, body: bytes) -> Response:
    run = RunId(creation.spec.run)
    session = await gateway.lookups.session(ids.session_of(run), tenant)
    await gateway.tenant_index.add_run(session, run)
    try:
        await gateway.admission.expect_run(tenant, run)
    except QuotaReached:
        await gateway.tenant_index.remove_run(session, run)
        raise
    await _mark_used(gateway, tenant, run)
    accepted = Accepted("create", optimizer=creation.with_optimizer, source=creation.source)
    await gateway.monitor.note_accepted(run, 0, accepted)
    await gateway.acceptor.create(creation, body)
    gateway.train_client.ring(run, 0)
    return _future(run, 0)


def _seed_of(run: RunId) -> int:
    """The seed if the client chose none: run ids are random, and a retry must get the same seed."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:4], "big")


async def get_info(request: Request) -> Response:
    """`tokenizer_id`, for get_tokenizer, is a directory if the client is on this machine, else the model's name."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = requests.decode(await bodies.read(request), requests.GetInfo)
    spec = await gateway.lookups.spec(query.model_id, tenant)
    model = await gateway.lookups.model(spec.base_model)
    tokenizer = (client_on_this_machine(request) and model.directory) or model.tokenizer_id
    info = {
        "type": "get_info",
        "model_id": spec.run,
        "model_data": {"arch": model.arch, "model_name": model.name, "tokenizer_id": tokenizer, **_computed_by(model)},
        "model_name": model.name,
        "is_lora": True,
        "lora_rank": spec.rank,
        "optimizer_config": {"type": "adamw"},
    }
    return JSONResponse(info)


def _computed_by(model: ModelRecord) -> dict[str, str]:
    """The implementation of the model's layers, as a field that the SDK passes through."""
    return {"computed_by": model.computed_by} if model.computed_by else {}


async def create_custom_loss(request: Request) -> Response:
    """Refused: clients compute custom losses themselves, because custom_loss_server_side is false."""
    tenant_of(request)
    await bodies.read_or_peek(request)
    raise UserError(
        "custom losses are not computed on this server; allowed: those that the client computes, which is the SDK's "
        "default: pass your function, or the handle of create_custom_loss, to forward_backward_custom"
    )


# ---- operations


async def forward_backward(request: Request) -> Response:
    """Protobuf, or JSON as SDK 0.18 to 0.24 send it.

    The error of an invalid or too large request is the result of its future, if the request has an address.
    """
    if "json" in request.headers.get("content-type", ""):
        return await _forward(request, body_decoders.json_forward_backward)
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read_or_peek(request)
    if not body.whole:
        packed = await bodies.in_worker(request, pack, body.data)
        return await _reject(gateway, tenant, RefusedRequest(bodies.too_large(request), packed, scan.peek(body.data)))
    return await _accept_decoded(request, body.data, body_decoders.protobuf_forward)


async def forward(request: Request) -> Response:
    """JSON only: SDK 0.25 and newer send it to forward_backward."""
    return await _forward(request, body_decoders.json_forward_only)


async def _forward(request: Request, decode: Callable[[bytes], DecodedRequest]) -> Response:
    tenant_of(request)
    return await _accept_decoded(request, await bodies.read(request), decode)


async def _accept_decoded(request: Request, body: bytes, decode: Callable[[bytes], DecodedRequest]) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    decoded = await bodies.in_worker(request, decode, body)
    if isinstance(decoded, RefusedRequest):
        return await _reject(gateway, tenant, decoded)
    return await _accept(gateway, tenant, "forward_backward", decoded)


async def optim_step(request: Request) -> Response:
    return await _json_operation(request, "optim_step", requests.OptimStep)


async def save_weights(request: Request) -> Response:
    return await _json_operation(request, "save_weights", requests.SaveWeights)


async def save_weights_for_sampler(request: Request) -> Response:
    return await _json_operation(request, "save_weights_for_sampler", requests.SaveWeightsForSampler)


async def save_weights_external(request: Request) -> Response:
    return await _json_operation(request, "save_weights_external", requests.SaveWeightsExternal)


async def _json_operation(request: Request, kind: Kind, schema: type[Sequenced]) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    operation = await _decode_or_reject(gateway, tenant, body, schema)
    if isinstance(operation, Response):
        return operation
    saves = getattr(operation, "path", None) is not None
    decoded = DecodedOperation(operation.model_id, operation.seq_id, pack(body))
    return await _accept(gateway, tenant, kind, decoded, saves=saves)


S = TypeVar("S", bound=msgspec.Struct)


async def _decode_or_reject(gateway: Services, tenant: Tenant, body: bytes, schema: type[S]) -> S | Response:
    """The request; or, for an invalid one with an address, the future of its error."""
    try:
        return requests.decode(body, schema)
    except UserError as error:
        return await _reject(gateway, tenant, RefusedRequest(error, pack(body), body_decoders.address(body)))


async def _accept(
    gateway: Services, tenant: Tenant, kind: Kind, operation: DecodedOperation, *, saves: bool = False
) -> Response:
    """`saves`: the operation makes a checkpoint."""
    run, seq = await _trainable(gateway, tenant, operation.model_id), operation.seq
    await _expect_capacity(gateway, run, seq)
    try:
        taken = await gateway.admission.take(tenant, run, seq, operation.tokens, saves=saves)
    except TooLarge as error:
        return await _reject(gateway, tenant, RefusedRequest(error, operation.packed, (run, seq)))
    accepted_at = None
    try:
        await _mark_used(gateway, tenant, run)
        provenance = await gateway.monitor.trace(tenant, run, operation.content)
        await gateway.monitor.note_accepted(run, seq, Accepted(kind, provenance, operation.optimizer))
        accepted_at = await gateway.acceptor.accept(run, seq, kind, operation.packed, provenance)
    finally:
        if accepted_at is None:  # a repetition, or an error
            gateway.admission.give_back(tenant, taken)
    if accepted_at is not None:
        gateway.accounts.note_accepted(run, seq, accepted_at, operation.tokens)
    if kind in SAVES:
        gateway.wakeups.collect.set()  # it may replace another of the same name, or have a time to live
    gateway.train_client.ring(run, seq)
    return _future(run, seq)


async def _reject(gateway: Services, tenant: Tenant, refused: RefusedRequest) -> Response:
    """Accept a request that cannot be served as a failed operation: a 4xx would leave a gap in the sequence."""
    if refused.address is None:
        raise refused.error
    model_id, seq = refused.address
    run = await _trainable(gateway, tenant, model_id)
    await _expect_capacity(gateway, run, seq)
    await _mark_used(gateway, tenant, run)
    await gateway.monitor.note_accepted(run, seq, Accepted("tombstone"))
    await gateway.acceptor.reject(run, seq, refused.packed, str(refused.error))
    gateway.train_client.ring(run, seq)
    return _future(run, seq)


async def _trainable(gateway: Services, tenant: Tenant, model_id: str) -> RunId:
    """The run's id. Raises NotFound, also if the run has ended, or UserError if it holds a copy of weights."""
    spec = await gateway.lookups.active_spec(model_id, tenant)
    if spec.copied_from:
        raise UserError(
            f"training run {model_id} holds a copy of {spec.copied_from} and cannot be trained; "
            "load the copy into a new run with create_training_client_from_state"
        )
    return RunId(spec.run)


async def _expect_capacity(gateway: Services, run: RunId, seq: int) -> None:
    """Raises TooMany while too many operations wait before `seq`, InvalidField for a `seq` that no client reaches."""
    if seq > max(gateway.results.applied(run), 0) + limits.operations_waiting_max:
        await gateway.results.find(run, seq)  # this process may not have read the newest commits
        ahead = seq - max(gateway.results.applied(run), 0)
        if ahead > limits.operations_ahead_max:
            allowed = f"at most {limits.operations_ahead_max} past the newest applied operation"
            raise InvalidField("seq_id", seq, allowed)
        if ahead > limits.operations_waiting_max:
            raise TooMany(
                f"{ahead} operations of {run} wait; allowed: {limits.operations_waiting_max}; send it again later"
            )


async def _mark_used(gateway: Services, tenant: Tenant, run: RunId) -> None:
    """Mark the run for accounting, so that its usage is entered even if a process dies."""
    if await gateway.accounts.mark(tenant, run):
        gateway.wakeups.accounts.set()


def _future(run: RunId, seq: int) -> Response:
    return JSONResponse({"request_id": ids.make_training_request_id(run, seq), "model_id": run})
