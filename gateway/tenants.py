"""Who asks."""

from starlette.requests import Request

from knapper.errors import Unauthorized
from knapper.ids import LOCAL_TENANT, Tenant


def tenant_of(request: Request) -> Tenant:
    """The tenant of the request's key; keys are off, so any will do and everyone is `local`. Raises Unauthorized."""
    if not request.headers.get("x-api-key"):
        raise Unauthorized(
            "header X-API-Key is missing; allowed: any key that begins with tml-; set TINKER_API_KEY=tml-local"
        )
    return LOCAL_TENANT
