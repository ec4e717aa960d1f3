"""What links lead to. No key is asked for, and nothing of the request is looked at but the link."""

from starlette.requests import Request
from starlette.responses import Response

from gateway.rest import sessions, weights
from gateway.services import parts


async def follow(request: Request) -> Response:
    gateway = parts(request)
    link = await gateway.links.open(request.path_params["token"])
    if link.kind == "trace":
        return await sessions.trace_of(gateway, link)
    return await weights.file_of(gateway, link)
