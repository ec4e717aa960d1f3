"""The files of jobs, for their owners: listed, and each served whole or in ranges."""

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from gateway import ranges
from gateway.jobs import job_services_of
from gateway.rest import responses
from gateway.routing import Door
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper.jobs.artifacts import Artifacts


async def list_files(request: Request) -> Response:
    """`sha256`: null for a file that another program put there."""
    tenant = tenant_of(request)
    artifacts = await Artifacts.of(job_services_of(services_of(request)), tenant, request.path_params["job"])
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
    """If the bucket can sign URLs, a redirect to it, so that the bytes bypass this server."""
    tenant, name = tenant_of(request), request.path_params["file"]
    job_services = job_services_of(services_of(request))
    opened = await (await Artifacts.of(job_services, tenant, request.path_params["job"])).open(name)
    if request.method == "GET":
        signed = await job_services.exchange.signed("GET", opened.entry.name, 0)
        if signed is not None:
            opened.close()
            return RedirectResponse(signed.url, 307, headers={"Cache-Control": "private, no-store"})
    return ranges.respond(request, opened, name.rpartition("/")[2])


ROUTES = [
    Door("/api/v1/jobs/{job}/files", list_files, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/files/{file:path}", get_file, methods=["GET"], body_bytes_max=0),
]
