"""Files of jobs for their owners: which there are, and each by itself, whole or in ranges."""

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from gateway import ranges
from gateway.jobs import place_of
from gateway.rest import responses
from gateway.routing import Door
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper.jobs.artifacts import Artifacts


async def list_files(request: Request) -> Response:
    """`sha256`: null of one that somebody else put there."""
    tenant = tenant_of(request)
    artifacts = await Artifacts.of(place_of(parts(request)), tenant, request.path_params["job"])
    files = [
        {
            "name": artifacts.name(entry),
            "size": entry.size,
            "sha256": entry.sha256 or None,
            "etag": entry.generation,
            "modified_at": responses.time(entry.modified_at),
        }
        for entry in await artifacts.listed()
    ]
    return JSONResponse({"files": files})


async def get_file(request: Request) -> Response:
    """Of a bucket by whose key somebody can sign, a redirect to it, so that the bytes do not come through here."""
    tenant, name = tenant_of(request), request.path_params["file"]
    place = place_of(parts(request))
    opened = await (await Artifacts.of(place, tenant, request.path_params["job"])).open(name)
    if request.method == "GET":
        signed = await place.exchange.presign("GET", opened.entry.name, 0)
        if signed is not None:
            opened.close()
            return RedirectResponse(signed.url, 307, headers={"Cache-Control": "private, no-store"})
    return ranges.answer(request, opened, name.rpartition("/")[2])


ROUTES = [
    Door("/api/v1/jobs/{job}/files", list_files, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/files/{file:path}", get_file, methods=["GET"], body_bytes_max=0),
]
