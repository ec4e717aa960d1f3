"""Links: URLs on this gateway that need no key, because they are signed. `downloads` answers them."""

from starlette.requests import Request

from gateway.services import parts
from knapper.state.signed_links import Link

ROUTE = "links/{token}"


async def url(request: Request, link: Link) -> str:
    """Where the link can be fetched: on the host that this request came to."""
    token = await parts(request).links.sign(link)
    return f"{str(request.base_url).rstrip('/')}/api/v1/{ROUTE.format(token=token)}"
