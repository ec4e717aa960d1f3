"""Weights of checkpoints: describe, copy, and link to their files."""

import asyncio
import hashlib

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses
from gateway.rest.checkpoints import path_of
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper import ids, limits
from knapper.errors import InvalidField, UserError
from knapper.ids import SessionId, Tenant, TinkerPath
from knapper.state.checkpoints import Checkpoint
from knapper.state.journal import bundles
from knapper.state.journal.records import Creation, Index
from knapper.state.sessions import Finish, Session
from knapper.state.signed_links import Link
from knapper.wire import encryption, json, rest
from knapper.wire.fields import expect_no_access_token


async def weights_info(request: Request) -> Response:
    """The parameters needed to load a checkpoint, the tenant's own or a public one."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.decode(await bodies.read(request), rest.WeightsInfo)
    checkpoint = await gateway.checkpoints.resolve(TinkerPath.parse(query.tinker_path, "tinker_path"), tenant)
    spec = (await index_of(gateway, checkpoint)).spec
    info = {
        "base_model": checkpoint.base_model,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": checkpoint.rank,
        "train_unembed": spec.train_unembed,
        "train_mlp": spec.train_mlp,
        "train_attn": spec.train_attn,
    }
    return JSONResponse(info)


async def copy_weights(request: Request) -> Response:
    """Copy a checkpoint, with its kind and name, into a new run, which cannot be trained.

    The two share the files, which stay while either exists. A repeated request (the same body under the same
    idempotency key) gets the first one's path.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    order = json.decode(body, rest.CopyWeights)
    expect_no_access_token(order.weights_access_token or request.headers.get("x-tinker-weights-access-token"))
    path = TinkerPath.parse(order.source_path, "source_path")
    source = await gateway.checkpoints.resolve(path, tenant)
    spec = (await index_of(gateway, source)).spec
    run = order.run()
    if run is None:
        key = request.headers.get("x-idempotency-key") or gateway.new_id()
        session = await _session(gateway, tenant, key, body, order.destination_project_id or "")
        run = ids.make_run_id(SessionId(session.session), 0)
    else:
        session = await gateway.lookups.open_session(ids.session_of(run), tenant)
    copy = TinkerPath(run, path.kind, path.name)
    if source.tenant != tenant and await gateway.acceptor.missing(run, 0):  # a copy of one's own shares its files
        await gateway.admission.expect_bytes(tenant, source.size_bytes)
    await gateway.audit.write(
        tenant, "checkpoint_copy", tinker_path=source.path, model_id=path.run, copied_to=str(copy)
    )
    await gateway.tenant_index.add_run(session, run)
    spec = msgspec.structs.replace(spec, run=run, tenant=tenant, copied_from=source.path, user_metadata_json="{}")
    await gateway.acceptor.create(Creation(spec=spec, source=source.bundle), body)
    now = gateway.clock()
    await gateway.checkpoints.save(
        msgspec.structs.replace(
            source, path=str(copy), tenant=tenant, seq=0, saved_at=now, public=False,
            expires_at=now + order.ttl_seconds if order.ttl_seconds is not None else 0.0,
        ),
        overwrite=False,
    )  # fmt: skip
    gateway.wakeups.collect.set()
    return JSONResponse({"tinker_path": str(copy)})


async def _session(gateway: Services, tenant: Tenant, key: str, body: bytes, project: str) -> Session:
    """The session of a copy; a request with the same key gets the same session."""
    digest = hashlib.sha256(b"\0".join((tenant.encode(), key.encode(), body))).hexdigest()
    session = SessionId(f"ses-{digest[:32]}")
    session_record = Session(
        session=session, tenant=tenant, created_at=gateway.clock(), project_id=project, display_name="copy of weights"
    )
    stored = await gateway.lookups.sessions.find_or_create(session_record)
    await gateway.tenant_index.add_session(stored)
    finish = Finish(reason="success", detail="copy_weights", finished_at=session_record.created_at)
    await gateway.lookups.finish(session, finish)
    return stored


async def external_weights_urls(request: Request) -> Response:
    """A link to each file of an external checkpoint: valid for an hour, for anyone who has it.

    The files of an encrypted checkpoint end in .age.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    path = path_of(request)
    if path.kind != "external_weights":
        raise InvalidField("checkpoint_id", f"{path.kind}/{path.name}", "external_weights/<name>")
    checkpoint = await gateway.checkpoints.resolve(path, tenant)
    index = await index_of(gateway, checkpoint)
    await gateway.audit.read(tenant, checkpoint.path, "download")
    expires_at = gateway.clock() + limits.link_s
    urls = {}
    for part in index.parts:
        link = Link(
            kind="weights", tenant=tenant, subject=str(path), expires_at=expires_at, part=part.name,
            bundle=checkpoint.bundle,
        )  # fmt: skip
        urls[_name(checkpoint, part.name)] = await responses.link_url(request, link)
    return JSONResponse({"urls": urls, "expires": responses.time(expires_at)})


async def file_of(gateway: Services, link: Link) -> Response:
    """The file behind a link, if its checkpoint still exists.

    Files are encrypted here and not when saved: encryption is not deterministic, and a repeated save must be.
    """
    checkpoint = await gateway.checkpoints.resolve(TinkerPath.parse(link.subject), link.tenant)
    index = await index_of(gateway, checkpoint)
    if checkpoint.bundle != link.bundle:
        raise UserError(f"checkpoint {link.subject} was saved anew since this link was made; ask for a new one")
    content = await bundles.read_part(gateway.store, checkpoint.bundle, index, link.part)
    if checkpoint.recipients:
        content = await asyncio.to_thread(encryption.encrypt, content, checkpoint.recipients)
    return Response(
        content,
        media_type="application/octet-stream",
        headers={
            "Content-Disposition": f'attachment; filename="{_name(checkpoint, link.part)}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-store",
        },
    )


def _name(checkpoint: Checkpoint, part: str) -> str:
    """The name of a file for its downloader."""
    return part + encryption.SUFFIX if checkpoint.recipients else part


async def index_of(gateway: Services, checkpoint: Checkpoint) -> Index:
    """The checkpoint's files. Raises UserError if they are gone."""
    index = await bundles.read_index(gateway.store, checkpoint.bundle)
    if index is None:
        raise UserError(f"checkpoint {checkpoint.path} has no files any more; use another one")
    return index
