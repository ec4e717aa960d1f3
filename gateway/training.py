"""Runs: made here, and fed. Every operation is durable before its client hears of it; nothing is computed."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, body_decoders
from gateway.body_decoders import DecodedOperation, RefusedRequest, Understood
from gateway.services import Services, parts
from gateway.tenants import on_this_machine, tenant_of
from knapper import ids, limits
from knapper.errors import InvalidField, TooMany, UserError
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


# ---- making runs


async def create_model(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked = requests.decode(body, requests.CreateModel)
    run, lora = asked.run(), asked.lora()
    await gateway.records.open_session(asked.session_id, tenant)
    model = await gateway.records.model(asked.base_model)
    if not model.trainable:
        raise InvalidField("base_model", asked.base_model, "a model that can be trained; see get_server_capabilities")
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
        # The SDK's default: it cannot be told from a wish. Asked for alone, it is one.
        keep_tied=lora.train_attn or lora.train_mlp,
        user_metadata_json=asked.user_metadata_json(),
    )
    return await _create(gateway, tenant, Creation(spec=spec), body)


async def load_weights(request: Request) -> Response:
    """Into a run, as one of its operations; or as the making of a new run, whose shape is the checkpoint's."""
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked = await _decode_or_bury(gateway, tenant, body, requests.LoadWeights)
    if isinstance(asked, Response):
        return asked
    try:
        run = asked.creates()
    except UserError as error:
        return await _bury(gateway, tenant, RefusedRequest(error, pack(body), body_decoders.address(body)))
    if run is None:
        operation = DecodedOperation(asked.model_id or "", asked.seq_id or 0, pack(body))
        return await _accept(gateway, tenant, "load_weights", operation)
    await gateway.records.open_session(asked.session(), tenant)
    checkpoint = await gateway.checkpoints.resolve(TinkerPath.parse(asked.path), tenant)
    checkpoint.expect_plain()
    model = await gateway.records.model(checkpoint.base_model)
    if asked.base_model is not None and asked.base_model not in (model.name, model.directory):
        raise InvalidField(
            "base_model", asked.base_model, f"{model.name!r}, on which {asked.path} was trained, or none"
        )
    index = await bundles.read_index(gateway.store, checkpoint.bundle)
    if index is None:
        raise UserError(f"checkpoint {asked.path} has no files any more; load another one")
    if asked.optimizer and not any(part.name == _OPTIMIZER_PART for part in index.parts):
        raise InvalidField(
            "path", asked.path, "a checkpoint with optimizer state (made by save_state), since optimizer is true",
            "Use create_training_client_from_state, which takes the weights alone",
        )  # fmt: skip
    metadata = asked.user_metadata_json()
    spec = msgspec.structs.replace(index.spec, run=run, tenant=tenant, user_metadata_json=metadata)
    creation = Creation(spec=spec, source=checkpoint.bundle, with_optimizer=asked.optimizer)
    await gateway.audit.read(tenant, checkpoint.path, "training")
    return await _create(gateway, tenant, creation, body)


async def _create(gateway: Services, tenant: Tenant, creation: Creation, body: bytes) -> Response:
    run = RunId(creation.spec.run)
    await gateway.register.add_run(await gateway.records.session(ids.session_of(run), tenant), run)
    await _mark(gateway, tenant, run)
    await gateway.acceptor.create(creation, body)
    gateway.bells.ring(run, 0)
    return _promise(run, 0)


def _seed_of(run: RunId) -> int:
    """Of a client that chose none: run ids are random, and a retry must get the same."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:4], "big")


async def get_info(request: Request) -> Response:
    """`tokenizer_id` is for get_tokenizer: a directory for clients that can read it, the model's name for others."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.GetInfo)
    spec = await gateway.records.spec(asked.model_id, tenant)
    model = await gateway.records.model(spec.base_model)
    tokenizer = (on_this_machine(request) and model.directory) or model.tokenizer_id
    info = {
        "type": "get_info",
        "model_id": spec.run,
        "model_data": {"arch": model.arch, "model_name": model.name, "tokenizer_id": tokenizer, **_computing(model)},
        "model_name": model.name,
        "is_lora": True,
        "lora_rank": spec.rank,
        "optimizer_config": {"type": "adamw"},
    }
    return JSONResponse(info)


def _computing(model: ModelRecord) -> dict[str, str]:
    """Whose code computes the layers, as a field that the SDK carries along."""
    return {"computed_by": model.computed_by} if model.computed_by else {}


async def create_custom_loss(request: Request) -> Response:
    """Refused: clients compute their losses themselves, as they do wherever custom_loss_server_side is false."""
    tenant_of(request)
    await bodies.read_or_peek(request)
    raise UserError(
        "custom losses are not computed on this server; allowed: those that the client computes, which is the SDK's "
        "default: pass your function, or the handle of create_custom_loss, to forward_backward_custom"
    )


# ---- feeding them


async def forward_backward(request: Request) -> Response:
    """Protobuf, or JSON as SDK 0.18 to 0.24 send it.

    A request that is wrong, or too large, is answered through its future if it says whose it is.
    """
    if "json" in request.headers.get("content-type", ""):
        return await _forward(request, body_decoders.json_forward_backward)
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read_or_peek(request)
    if not body.whole:
        packed = await bodies.computed(request, pack, body.data)
        return await _bury(gateway, tenant, RefusedRequest(bodies.too_large(request), packed, scan.peek(body.data)))
    return await _understood(request, body.data, body_decoders.protobuf_forward)


async def forward(request: Request) -> Response:
    """JSON only: SDK 0.25 and newer send it to forward_backward."""
    return await _forward(request, body_decoders.json_forward_only)


async def _forward(request: Request, understand: Callable[[bytes], Understood]) -> Response:
    tenant_of(request)
    return await _understood(request, await bodies.read(request), understand)


async def _understood(request: Request, body: bytes, understand: Callable[[bytes], Understood]) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    asked = await bodies.computed(request, understand, body)
    if isinstance(asked, RefusedRequest):
        return await _bury(gateway, tenant, asked)
    return await _accept(gateway, tenant, "forward_backward", asked)


async def optim_step(request: Request) -> Response:
    return await _json_operation(request, "optim_step", requests.OptimStep)


async def save_weights(request: Request) -> Response:
    return await _json_operation(request, "save_weights", requests.SaveWeights)


async def save_weights_for_sampler(request: Request) -> Response:
    return await _json_operation(request, "save_weights_for_sampler", requests.SaveWeightsForSampler)


async def save_weights_external(request: Request) -> Response:
    return await _json_operation(request, "save_weights_external", requests.SaveWeightsExternal)


async def _json_operation(request: Request, kind: Kind, form: type[Sequenced]) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    asked = await _decode_or_bury(gateway, tenant, body, form)
    if isinstance(asked, Response):
        return asked
    return await _accept(gateway, tenant, kind, DecodedOperation(asked.model_id, asked.seq_id, pack(body)))


S = TypeVar("S", bound=msgspec.Struct)


async def _decode_or_bury(gateway: Services, tenant: Tenant, body: bytes, form: type[S]) -> S | Response:
    """The request; or, for a wrong one that says whose it is, the promise of its error."""
    try:
        return requests.decode(body, form)
    except UserError as error:
        return await _bury(gateway, tenant, RefusedRequest(error, pack(body), body_decoders.address(body)))


async def _accept(gateway: Services, tenant: Tenant, kind: Kind, asked: DecodedOperation) -> Response:
    run, seq = await _trainable(gateway, tenant, asked.model_id), asked.seq
    await _room(gateway, run, seq)
    await _mark(gateway, tenant, run)
    accepted_at = await gateway.acceptor.accept(run, seq, kind, asked.packed)
    if accepted_at is not None:
        gateway.accounts.note_accepted(run, seq, accepted_at, asked.tokens)
    if kind in SAVES:
        gateway.stirs.collect.set()  # it may take the name of another, or have a time to live
    gateway.bells.ring(run, seq)
    return _promise(run, seq)


async def _bury(gateway: Services, tenant: Tenant, refused: RefusedRequest) -> Response:
    """Use up the number of a request that cannot be served, and promise the error: a 4xx would leave a hole."""
    if refused.address is None:
        raise refused.error
    model_id, seq = refused.address
    run = await _trainable(gateway, tenant, model_id)
    await _room(gateway, run, seq)
    await _mark(gateway, tenant, run)
    await gateway.acceptor.reject(run, seq, refused.packed, str(refused.error))
    gateway.bells.ring(run, seq)
    return _promise(run, seq)


async def _trainable(gateway: Services, tenant: Tenant, model_id: str) -> RunId:
    """The run. Raises NotFound, also for one that has ended, or UserError for one that only holds a copy."""
    spec = await gateway.records.living(model_id, tenant)
    if spec.copied_from:
        raise UserError(
            f"training run {model_id} holds a copy of {spec.copied_from} and cannot be trained; "
            "load the copy into a new run with create_training_client_from_state"
        )
    return RunId(spec.run)


async def _room(gateway: Services, run: RunId, seq: int) -> None:
    """Raises TooMany while too much waits before `seq`, InvalidField for a number that no client gets to."""
    if seq > max(gateway.results.applied(run), 0) + limits.operations_waiting_max:
        await gateway.results.find(run, seq)  # perhaps more was applied than this process has heard
        ahead = seq - max(gateway.results.applied(run), 0)
        if ahead > limits.operations_ahead_max:
            allowed = f"at most {limits.operations_ahead_max} past the newest applied operation"
            raise InvalidField("seq_id", seq, allowed)
        if ahead > limits.operations_waiting_max:
            raise TooMany(
                f"{ahead} operations of {run} wait; allowed: {limits.operations_waiting_max}; send it again later"
            )


async def _mark(gateway: Services, tenant: Tenant, run: RunId) -> None:
    """What the run uses from here on is accounted for, whoever dies."""
    if await gateway.accounts.mark(tenant, run):
        gateway.stirs.accounts.set()


def _promise(run: RunId, seq: int) -> Response:
    return JSONResponse({"request_id": ids.make_training_request_id(run, seq), "model_id": run})
