"""The tenant of each request: authenticated once, before its handler, which gets it from `tenant_of` only."""

from ipaddress import IPv6Address, ip_address

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import origins
from gateway.services import Services, services_of
from knapper.errors import InvalidToken, KnapperError, Unauthorized
from knapper.ids import LOCAL_TENANT, Tenant
from knapper.state.api_keys import Key, Keyring
from knapper.state.tokens import AccessTokens

_ASKER = "knapper.asker"
_BEARER = "bearer "
_FORWARDING = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


def tenant_of(request: Request) -> Tenant:
    """The tenant of the request's key, or of the token in its place. Raises Unauthorized, InvalidToken or StoreError.

    Every handler that reads or writes tenants' data calls it first. With keys off, every client is `local`.
    """
    asker: Tenant | KnapperError = request.scope[_ASKER]
    if isinstance(asker, KnapperError):
        raise asker
    return asker


def admit(request: Request, tenant: Tenant) -> None:
    """From here on the request is the tenant's, whatever its headers say: the console's pages know it by a cookie."""
    request.scope[_ASKER] = tenant or Unauthorized("sign in with a key of this server, or send it as X-API-Key")


class Doorkeeper:
    """The middleware that authenticates. It lets every request pass: `tenant_of` refuses those without a valid key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                scope[_ASKER] = await _authenticate(request, services_of(request))
            except KnapperError as error:
                scope[_ASKER] = error
        await self._app(scope, receive, send)


async def _authenticate(request: Request, gateway: Services) -> Tenant:
    if gateway.keys is None:
        expect_this_machine(request)
        key = key_of(request)
        if is_token(key):
            _tokens(gateway.access_tokens).claims(key)
        return LOCAL_TENANT
    return Tenant((await _record(key_of(request), gateway.keys, gateway.access_tokens)).tenant)


def expect_this_machine(request: Request) -> None:
    """Raises Unauthorized for a request from elsewhere, to a server that asks for no keys."""
    if not on_this_machine(request):
        raise Unauthorized(
            "keys are off on this server, so it answers its own machine only; allowed elsewhere: a server whose "
            "operator sets KNAPPER_KEYS=true, and makes keys with `knapper key create`"
        )


async def _record(key: str, keys: Keyring, tokens: AccessTokens | None) -> Key:
    """The record of the key, or of the key that the token was exchanged for: revoking it ends the token, too."""
    if not is_token(key):
        return await keys.of_key(key)
    claims = _tokens(tokens).claims(key)
    if not claims.key:
        raise InvalidToken("the token was issued while keys were off; exchange your key for another")
    return await keys.of_id(claims.key)


def _tokens(tokens: AccessTokens | None) -> AccessTokens:
    if tokens is None:
        raise Unauthorized("X-API-Key holds a token, and this server issues none; allowed: a key that begins with tml-")
    return tokens


async def record_of(request: Request) -> Key | None:
    """The record of the request's key, or None if keys are off. Raises what `tenant_of` does."""
    gateway = services_of(request)
    tenant_of(request)
    return None if gateway.keys is None else await _record(key_of(request), gateway.keys, gateway.access_tokens)


def key_of(request: Request) -> str:
    """The key, as the Tinker SDK or OpenAI's clients send it. Raises Unauthorized if there is none."""
    if key := request.headers.get("x-api-key"):
        return key
    authorization = request.headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER and (key := authorization[len(_BEARER) :].strip()):
        return key
    if services_of(request).keys is None:
        allowed = "any key that begins with tml-; set TINKER_API_KEY=tml-local"
    else:
        allowed = "a key that the server's operator made with `knapper key create`; set TINKER_API_KEY to it"
    raise Unauthorized(f"header X-API-Key is missing; allowed: {allowed}")


def is_token(key: str) -> bool:
    return key.startswith("eyJ")  # '{"' in base64, with which every JWT begins


def client_on_this_machine(request: Request) -> bool:
    """Whether the client itself is, as far as can be told: no proxy of this machine forwards it, and it calls the
    machine by a name that leads nowhere else.
    """
    forwarded = any(name in request.headers for name in _FORWARDING)
    return (
        on_this_machine(request)
        and not forwarded
        and origins.is_loopback(origins.name_of(request.headers.get("host", "")))
    )


def on_this_machine(request: Request) -> bool:
    """Whether the connection, or the proxy that forwards it, comes from this machine."""
    if request.client is None:  # a socket in the file system
        return True
    try:
        address = ip_address(request.client.host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
