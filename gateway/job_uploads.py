"""Large files of jobs, uploaded in parts: the parts received so far, and one more. An upload can be resumed."""

import base64
import hashlib
import re
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.jobs import job_services_of
from gateway.routing import Door
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField, QuotaUsedUp
from knapper.exchange import Exchange
from knapper.jobs import staging
from knapper.jobs.staging import File

_SHA256: Final = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")


async def progress(request: Request) -> Response:
    """Each part, and whether it was received; if the bucket can sign URLs, the request that uploads it there."""
    file = _file(request)
    exchange = job_services_of(services_of(request)).exchange
    received = await staging.received(exchange, file)
    missing_bytes = sum(size for offset, size in file.parts.items() if offset not in received)
    await staging.expect_capacity(exchange, file.tenant, missing_bytes)
    if missing_bytes:
        await services_of(request).admission.expect_bytes(file.tenant, file.size)
    parts = [
        {
            "offset": offset,
            "size": size,
            "received": offset in received,
            "signed": await _signed(exchange, file, offset),
        }
        for offset, size in file.parts.items()
    ]
    return JSONResponse({"size": file.size, "part_size": limits.upload_part_bytes, "parts": parts})


async def put_part(request: Request) -> Response:
    """Stores one part, after checking its size and, if sent, its `Content-Digest` (RFC 9530). Safe to repeat."""
    file = _file(request)
    offset = file.offset(request.path_params["offset"])
    exchange = job_services_of(services_of(request)).exchange
    data = await bodies.read(request)
    digest = await bodies.in_thread(request, len(data), lambda: hashlib.sha256(data).digest())
    _expect_digest(request, digest)
    try:
        await services_of(request).admission.expect_bytes(file.tenant, file.size)
    except QuotaUsedUp:
        if offset not in await staging.received(exchange, file):
            raise
    await staging.take(exchange, file, offset, bytes(data))
    return JSONResponse({"offset": offset, "size": len(data)})


def _file(request: Request) -> File:
    return File.parse(tenant_of(request), request.path_params["sha256"], request.path_params["size"])


async def _signed(exchange: Exchange, file: File, offset: int) -> dict[str, Any] | None:
    signed = await exchange.presign("PUT", file.part(offset), file.parts[offset])
    return None if signed is None else {"url": signed.url, "headers": dict(signed.headers)}


def _expect_digest(request: Request, digest: bytes) -> None:
    """Raises InvalidField unless `digest` is the one in the header, if there is one."""
    header = request.headers.get("content-digest")
    if header is None:
        return
    match = _SHA256.search(header)
    if match is None or base64.b64decode(match[1]) != digest:
        actual = base64.b64encode(digest).decode()
        raise InvalidField(
            "Content-Digest", header, f"sha-256=:{actual}:, of the bytes that came", "Send the part again"
        )


ROUTES = [
    Door("/api/v1/uploads/{sha256}/{size}", progress, methods=["GET"], body_bytes_max=0),
    Door(
        "/api/v1/uploads/{sha256}/{size}/{offset}", put_part, methods=["PUT"], body_bytes_max=limits.upload_part_bytes
    ),
]
