"""The host names and origins that a gateway without keys accepts.

Without keys, every account on this machine may call the gateway, but no web page that its users open may. A browser
lets a page call any host name, including one that its owner points here (DNS rebinding), and names it in `Host`; and it
lets the page send simple requests to any server, and names the page's site in `Origin`.
"""

import re
from ipaddress import IPv6Address, ip_address
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import errors
from knapper.errors import ForeignSite
from knapper.settings import Settings

_AUTHORITY: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::(\d{0,5}))?")
_ORIGIN: Final = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]+)")
_PORTS: Final = {"http": "80", "https": "443"}
_OWN: Final = "localhost, 127.0.0.1, [::1], and the names in KNAPPER_HOSTS"


def middleware(settings: Settings) -> list[Middleware]:
    """Empty if keys are on: a page has no key, and a server with keys may be reached by any name."""
    names = (*settings.hosts.split(","), settings.events_host)
    allowed = frozenset(name_of(name) for name in names if name)
    return [] if settings.keys else [Middleware(_OriginCheck, allowed=allowed)]


class _OriginCheck:
    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                expect(Headers(scope=scope), self._allowed)
            except ForeignSite as error:
                await (await errors.known_error(Request(scope), error))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def expect(headers: Headers, allowed: frozenset[str]) -> None:
    """Raises ForeignSite unless `Host` is this machine or an allowed name, and `Origin` is absent or one of these."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    host = hosts[0] if len(hosts) == 1 else ""
    name = name_of(host)
    if not (is_loopback(name) or name in allowed):
        raise ForeignSite(f"the header Host is {_shown(hosts)}; allowed without keys: {_OWN}")
    if origins and not (len(origins) == 1 and _same_or_allowed(origins[0], host, allowed)):
        raise ForeignSite(
            f"the header Origin is {_shown(origins)}: a page of another server; allowed without keys: this server's "
            "own, and those of the names in KNAPPER_HOSTS"
        )


def expect_same_origin(headers: Headers) -> None:
    """Raises ForeignSite for a request that a page of another server made. Programs that are no browser name none."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    own = (
        len(hosts) == 1 and len(origins) <= 1 and all(_same_or_allowed(each, hosts[0], frozenset()) for each in origins)
    )
    if not own or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ForeignSite(f"the header Origin is {_shown(origins)}; allowed here: pages of this very server")


def name_of(authority: str) -> str:
    """The name in `name:port`, normalised for comparison; empty if malformed."""
    match = _AUTHORITY.fullmatch(authority)
    return match[1].lower().strip("[]").removesuffix(".") if match else ""


def is_loopback(name: str) -> bool:
    try:
        address = ip_address(name)
    except ValueError:
        return name == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _same_or_allowed(origin: str, host: str, allowed: frozenset[str]) -> bool:
    match = _ORIGIN.fullmatch(origin)
    if match is None:  # "null": the page hides its origin
        return False
    scheme, authority = match.groups()
    name = name_of(authority)
    return bool(name) and (name in allowed or (name, _port(authority, scheme)) == (name_of(host), _port(host, scheme)))


def _port(authority: str, scheme: str) -> str:
    match = _AUTHORITY.fullmatch(authority)
    return (match[2] if match else "") or _PORTS.get(scheme, "")


def _shown(values: list[str]) -> str:
    return ", ".join(repr(value[:120]) for value in values[:3]) or "missing"
