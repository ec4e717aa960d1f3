"""Signing in with a key, and out."""

import re

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from gateway.console.pages import Viewer, open_page, page, render, wants_html, with_cookie, without_cookie
from knapper import limits
from knapper.errors import Unauthorized

_PATH = re.compile(r"/(?:[A-Za-z0-9_:.~-][A-Za-z0-9_:.~/-]*)?")  # of this server: neither //host nor /\host


async def show(request: Request, viewer: Viewer) -> Response:
    if viewer.tenant:
        return RedirectResponse("/", 303)
    return render(request, viewer, "signin.html", next=_next(request.query_params.get("next", "/")), wrong="")


async def sign_in(request: Request, viewer: Viewer) -> Response:
    """A session for the key of the form. Its body, of a few fields, is read before anybody is known."""
    fields = request.state.form
    keys, sessions = viewer.gateway.keys, viewer.gateway.console.sessions
    if keys is None:
        return RedirectResponse("/", 303)
    to = _next(fields.get("next", "/"))
    try:
        key = await keys.of_key(fields.get("key", "").strip())
    except Unauthorized:
        if not wants_html(request):
            raise
        wrong = "This is not a key of this server, or it was revoked. Its operator makes keys with knapper key create."
        return render(request, viewer, "signin.html", 401, next=to, wrong=wrong)
    session = sessions.begin(key.tenant, key.id)
    signed_in = Viewer(viewer.gateway, viewer.tenant, session)
    return await with_cookie(request, signed_in, RedirectResponse(to, 303))


async def sign_out(request: Request, _: Viewer) -> Response:
    return without_cookie(request, RedirectResponse("/signin", 303))


def _next(path: str) -> str:
    """The page to go to: of this server, whatever the query says."""
    return path if len(path) <= limits.text_chars_max and _PATH.fullmatch(path) else "/"


ROUTES = [
    open_page("/signin", show),
    open_page("/signin", sign_in, method="POST", body_bytes_max=limits.console_form_bytes_max),
    page("/signout", sign_out, method="POST", body_bytes_max=limits.console_form_bytes_max),
]
