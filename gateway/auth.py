"""Keys and tokens: a key exchanged for a token, described, and revoked."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.services import services_of
from gateway.tenants import is_token, key_of, record_of, tenant_of
from knapper.errors import Unauthorized, UserError


async def token(request: Request) -> Response:
    """A token for the tenant of the key. A token cannot be exchanged for another, so a stolen one expires."""
    tokens, tenant = services_of(request).access_tokens, tenant_of(request)
    await bodies.read(request)
    if tokens is None:
        raise UserError("this server issues no tokens; send the key itself with every request (KNAPPER_JWT is false)")
    _expect_key(request)
    key = await record_of(request)
    return JSONResponse({"jwt": tokens.issue(tenant, key.id if key is not None else "")})


async def describe_key(request: Request) -> Response:
    """What `tinker auth login` shows and stores."""
    tenant, key = tenant_of(request), await record_of(request)
    described = {
        "key_id": 0 if key is None else int(key.id, 16),
        "name": tenant if key is None else key.id,
        "note": "keys are off: any key that begins with tml- is good, and everyone is the same tenant"
        if key is None
        else key.note,
        "details": {"org_details": {"name": tenant}, "user_details": {"email": tenant}},
    }
    return JSONResponse(described)


async def delete_key(request: Request) -> Response:
    """Revoke the key of this request, and no other."""
    gateway, tenant = services_of(request), tenant_of(request)
    key = await record_of(request)
    if gateway.keys is None or key is None:
        raise UserError("keys are off on this server, so there is none to delete; forget it on your side")
    _expect_key(request)
    await gateway.audit.write(tenant, "key_revoke", key_id=key.id)
    await gateway.keys.revoke(key)
    return JSONResponse({"status": "ok"})


def _expect_key(request: Request) -> None:
    if is_token(key_of(request)):
        raise Unauthorized("X-API-Key holds a token; allowed here: the key that begins with tml-")
