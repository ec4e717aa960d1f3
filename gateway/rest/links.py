"""GET links/{token}: the document behind a signed link. The signature is all that is checked: there is no key."""

from starlette.requests import Request
from starlette.responses import Response

from gateway.rest import sessions, weights
from gateway.services import services_of


async def follow(request: Request) -> Response:
    gateway = services_of(request)
    link = await gateway.signed_links.open(request.path_params["token"])
    if link.kind == "trace":
        return await sessions.trace_of(gateway, link)
    return await weights.file_of(gateway, link)
