"""Who asks."""

from starlette.requests import Request

from gateway.parts import parts
from knapper.errors import Unauthorized
from knapper.ids import LOCAL_TENANT, Tenant


def tenant_of(request: Request) -> Tenant:
    """The tenant of the request's key; keys are off, so any will do and everyone is `local`. Raises Unauthorized.

    Where tokens are on, one may stand in the key's place: it says whose it is. Raises InvalidToken.
    """
    key = key_of(request)
    if not is_token(key):
        return LOCAL_TENANT
    tokens = parts(request).tokens
    if tokens is None:
        raise Unauthorized("X-API-Key holds a token, and this server issues none; allowed: a key that begins with tml-")
    return tokens.tenant(key)


def key_of(request: Request) -> str:
    """Raises Unauthorized if there is none."""
    if key := request.headers.get("x-api-key"):
        return key
    raise Unauthorized(
        "header X-API-Key is missing; allowed: any key that begins with tml-; set TINKER_API_KEY=tml-local"
    )


def is_token(key: str) -> bool:
    return key.startswith("eyJ")  # '{"' in base64, with which every JWT begins
