"""Pages: who looks, what they are sent, and the headers that keep a browser from anything else."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from gateway import errors, origins, tenants
from gateway.console import html
from gateway.console.session import BrowserSession
from gateway.routing import Door
from gateway.routing import body_bytes_max as body_bytes_max_of
from gateway.services import Services, services_of
from knapper import limits
from knapper.errors import InvalidField, KnapperError, NotFound, Unauthorized
from knapper.ids import LOCAL_TENANT, Tenant
from knapper.web import requests
from knapper.wire.untrusted import parsing

_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FORM: Final = "application/x-www-form-urlencoded"
_SAFE: Final = ("GET", "HEAD")


@dataclass(frozen=True)
class Viewer:
    """Who looks at a page. `session`: None for a client that sends its key with the request."""

    gateway: Services
    tenant: Tenant
    session: BrowserSession | None
    csrf: str = ""
    is_new: bool = False  # the browser does not have the session yet

    @property
    def admin(self) -> bool:
        """Whether it sees all tenants: the operator's tenant does, and without keys there is only one."""
        return self.gateway.keys is None or (bool(self.tenant) and self.tenant == self.gateway.console.admin)


Handler = Callable[[Request, Viewer], Awaitable[Response]]


def page(path: str, handler: Handler, *, method: str = "GET", body_bytes_max: int = 0) -> Door:
    """A route for those who are signed in."""
    return _door(path, handler, _signed_in, method, body_bytes_max)


def open_page(path: str, handler: Handler, *, method: str = "GET", body_bytes_max: int = 0) -> Door:
    """A route for everyone; its viewer may be nobody."""
    return _door(path, handler, _anyone, method, body_bytes_max)


def render(request: Request, viewer: Viewer, template: str, status: int = 200, **values: object) -> HTMLResponse:
    return HTMLResponse(html.render(template, request=request, viewer=viewer, **values), status)


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form. Raises UserError, TooLarge."""
    body = await requests.body(request, body_bytes_max_of(request))
    with parsing(lambda error: InvalidField("the form", str(error)[:80], "fields of a form, as a browser sends them")):
        return dict(parse_qsl(body.decode(), max_num_fields=limits.console_fields_max, keep_blank_values=True))


def query_number(request: Request, name: str, default: int, most: int = limits.offset_max) -> int:
    """A number from the query, 0 to `most`. Raises InvalidField."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and int(text) <= most):
        raise InvalidField(name, text[:80], f"a whole number from 0 to {most}")
    return int(text)


async def with_cookie(request: Request, viewer: Viewer, response: Response) -> Response:
    """The response, which gives the browser the viewer's session."""
    assert viewer.session is not None
    response.set_cookie(
        _cookie_name(request), await viewer.gateway.console.sessions.seal(viewer.session),
        max_age=int(limits.console_session_s), path="/", httponly=True, samesite="strict", secure=_is_secure(request),
    )  # fmt: skip
    return response


def without_cookie(request: Request, response: Response) -> Response:
    """The response, on which the browser forgets the session. It minds only what says the same as what set it."""
    response.delete_cookie(
        _cookie_name(request), path="/", httponly=True, samesite="strict", secure=_is_secure(request)
    )
    return response


def _cookie_name(request: Request) -> str:
    """`__Host-`: a browser then takes it from this very host, over TLS, and from nobody else."""
    return "__Host-knapper" if _is_secure(request) else "knapper"


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _door(
    path: str, handler: Handler, viewer_of: Callable[[Request], Awaitable[Viewer]], method: str, body_bytes_max: int
) -> Door:
    async def endpoint(request: Request) -> Response:
        viewer = _nobody(request)
        try:
            viewer = await viewer_of(request)
            tenants.admit(request, viewer.tenant)
            if request.method not in _SAFE:
                await _expect_own_page(request, viewer)
            response = await handler(request, viewer)
            if viewer.is_new and request.method in _SAFE:
                response = await with_cookie(request, viewer, response)
        except KnapperError as error:
            response = await _failed(request, viewer, error)
        response.headers.update({name: value for name, value in _HEADERS.items() if name not in response.headers})
        return response

    return Door(path, endpoint, methods=[method], body_bytes_max=body_bytes_max)


async def _signed_in(request: Request) -> Viewer:
    """Raises Unauthorized."""
    viewer = await _anyone(request)
    if not viewer.tenant:
        raise Unauthorized("sign in with a key of this server, or send it as X-API-Key")
    return viewer


async def _anyone(request: Request) -> Viewer:
    """Who it is by the key or the cookie of the request; nobody without either. Raises Unauthorized for a bad key."""
    gateway = services_of(request)
    if gateway.keys is None:
        tenants.expect_this_machine(request)
    elif "x-api-key" in request.headers or "authorization" in request.headers:
        return Viewer(gateway, tenants.tenant_of(request), None)
    tenant = LOCAL_TENANT if gateway.keys is None else ""
    sessions = gateway.console.sessions
    session = await _session(gateway, request.cookies.get(_cookie_name(request), ""))
    is_new = session is None
    session = session or sessions.begin(tenant)
    return Viewer(gateway, Tenant(session.tenant), session, await sessions.csrf(session), is_new)


async def _session(gateway: Services, cookie: str) -> BrowserSession | None:
    """The session of the cookie, whose key is still good; None for any other."""
    try:
        session = await gateway.console.sessions.open(cookie)
        if gateway.keys is None:
            return session if session.tenant == LOCAL_TENANT else None
        if session.tenant and (await gateway.keys.of_id(session.key)).tenant != session.tenant:
            return None
        return session
    except Unauthorized:
        return None


def _nobody(request: Request) -> Viewer:
    return Viewer(services_of(request), Tenant(""), None)


async def _expect_own_page(request: Request, viewer: Viewer) -> None:
    """Raises ForeignSite or UserError unless the request was made by a page of this server, for this session.

    A form's fields are then in `request.state.form`.
    """
    origins.expect_same_origin(request.headers)
    is_form = request.headers.get("content-type", "").startswith(_FORM)
    request.state.form = await _form(request) if is_form else {}
    if viewer.session is None:  # it came with a key, which no browser sends by itself
        return
    token = request.headers.get("x-csrf-token") or request.state.form.get("csrf", "")
    await viewer.gateway.console.sessions.expect_csrf(viewer.session, token)


def wants_html(request: Request) -> bool:
    """Whether a browser asks; other clients are told of errors as the API tells them."""
    return "text/html" in request.headers.get("accept", "") or "hx-request" in request.headers


async def _failed(request: Request, viewer: Viewer, error: KnapperError) -> Response:
    """A page that says what is wrong, for a browser; for other clients what the API answers."""
    if not wants_html(request):
        return await errors.known_error(request, error)
    if isinstance(error, Unauthorized) and request.method in _SAFE and services_of(request).keys is not None:
        return RedirectResponse(f"/signin?next={quote(request.url.path)}", 303)
    return render(request, viewer, "error.html", error.status, error=error)


def missing(what: str) -> NotFound:
    return NotFound(f"{what}; it may have been deleted")
