"""Who a client is: its key exchanged for a token, and what the command line asks about a key."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.parts import parts
from gateway.tenants import is_token, key_of, tenant_of
from knapper.errors import Unauthorized, UserError


async def token(request: Request) -> Response:
    """A token for the tenant of the key. A token buys no other: one that was stolen ends by itself."""
    tokens, tenant = parts(request).tokens, tenant_of(request)
    await bodies.read(request)
    if tokens is None:
        raise UserError("this server issues no tokens; send the key itself with every request (KNAPPER_JWT is false)")
    if is_token(key_of(request)):
        raise Unauthorized("X-API-Key holds a token; allowed here: the key that begins with tml-")
    return JSONResponse({"jwt": tokens.issue(tenant)})


async def describe_key(request: Request) -> Response:
    """What `tinker auth login` shows and stores."""
    tenant = tenant_of(request)
    answer = {
        "key_id": 0,
        "name": tenant,
        "note": "keys are off: any key that begins with tml- is good, and everyone is the same tenant",
        "details": {"org_details": {"name": tenant}, "user_details": {"email": tenant}},
    }
    return JSONResponse(answer)


async def delete_key(request: Request) -> Response:
    tenant_of(request)
    raise UserError("keys are off on this server, so there is none to delete; forget it on your side")
