"""Large files of jobs, in parts: how far they have come, and one part after another, by whoever was cut off, too."""

import base64
import hashlib
import re
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.jobs import place_of
from gateway.routing import Door
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField
from knapper.exchange import Exchange
from knapper.jobs import staging
from knapper.jobs.staging import File

_SHA256: Final = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")


async def progress(request: Request) -> Response:
    """Each part, and whether it is there; where somebody can sign, the request that sends it past this server."""
    file = _file(request)
    exchange = place_of(parts(request)).exchange
    there = await staging.received(exchange, file)
    left = sum(size for offset, size in file.parts.items() if offset not in there)
    await staging.expect_capacity(exchange, file.tenant, left)
    listed = [
        {"offset": offset, "size": size, "received": offset in there, "signed": await _signed(exchange, file, offset)}
        for offset, size in file.parts.items()
    ]
    return JSONResponse({"size": file.size, "part_size": limits.upload_part_bytes, "parts": listed})


async def put_part(request: Request) -> Response:
    """Of the part's size, and with its `Content-Digest` (RFC 9530), where that was sent. A repetition is silent."""
    file = _file(request)
    offset = file.offset(request.path_params["offset"])
    exchange = place_of(parts(request)).exchange
    data = await bodies.read(request)
    digest = await bodies.aside(request, len(data), lambda: hashlib.sha256(data).digest())
    _expect_digest(request, digest)
    await staging.take(exchange, file, offset, bytes(data))
    return JSONResponse({"offset": offset, "size": len(data)})


def _file(request: Request) -> File:
    return File.parse(tenant_of(request), request.path_params["sha256"], request.path_params["size"])


async def _signed(exchange: Exchange, file: File, offset: int) -> dict[str, Any] | None:
    signed = await exchange.signed("PUT", file.part(offset), file.parts[offset])
    return None if signed is None else {"url": signed.url, "headers": dict(signed.headers)}


def _expect_digest(request: Request, digest: bytes) -> None:
    """Raises InvalidField for another than was sent."""
    header = request.headers.get("content-digest")
    if header is None:
        return
    found = _SHA256.search(header)
    if found is None or base64.b64decode(found[1]) != digest:
        came = base64.b64encode(digest).decode()
        raise InvalidField("Content-Digest", header, f"sha-256=:{came}:, of the bytes that came", "Send the part again")


ROUTES = [
    Door("/api/v1/uploads/{sha256}/{size}", progress, methods=["GET"], body_bytes_max=0),
    Door(
        "/api/v1/uploads/{sha256}/{size}/{offset}", put_part, methods=["PUT"], body_bytes_max=limits.upload_part_bytes
    ),
]
