"""By which names, and from whose pages, a gateway without keys may be called.

Where no key is asked for, whoever has an account on this machine may call; a page that one of them looks at may not. A
browser lets it call by any name, also one that its owner makes lead here, and says that name (`Host`); and it lets it
send simple requests to anybody, and says where the page is from (`Origin`).
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
    """None where keys are asked for: a page has none, and a server with keys is reached by whatever name."""
    names = (*settings.hosts.split(","), settings.events_host)
    named = frozenset(name_of(name) for name in names if name)
    return [] if settings.keys else [Middleware(_Sites, named=named)]


class _Sites:
    def __init__(self, app: ASGIApp, named: frozenset[str]) -> None:
        self._app, self._named = app, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                expect(Headers(scope=scope), self._named)
            except ForeignSite as error:
                await (await errors.known(Request(scope), error))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def expect(headers: Headers, named: frozenset[str]) -> None:
    """Raises ForeignSite unless a request came by a name of this machine, or `named`, and from no page but theirs."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    host = hosts[0] if len(hosts) == 1 else ""
    name = name_of(host)
    if not (is_loopback(name) or name in named):
        raise ForeignSite(f"the header Host is {_shown(hosts)}; allowed without keys: {_OWN}")
    if origins and not (len(origins) == 1 and _same_or_named(origins[0], host, named)):
        raise ForeignSite(
            f"the header Origin is {_shown(origins)}: a page of another server; allowed without keys: this server's "
            "own, and those of the names in KNAPPER_HOSTS"
        )


def name_of(authority: str) -> str:
    """Of `name:port`, as names are compared; empty if it is neither."""
    found = _AUTHORITY.fullmatch(authority)
    return found[1].lower().strip("[]").removesuffix(".") if found else ""


def is_loopback(name: str) -> bool:
    try:
        address = ip_address(name)
    except ValueError:
        return name == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _same_or_named(origin: str, host: str, named: frozenset[str]) -> bool:
    found = _ORIGIN.fullmatch(origin)
    if found is None:  # "null": of a page that hides where it is from
        return False
    scheme, authority = found.groups()
    name = name_of(authority)
    return bool(name) and (name in named or (name, _port(authority, scheme)) == (name_of(host), _port(host, scheme)))


def _port(authority: str, scheme: str) -> str:
    found = _AUTHORITY.fullmatch(authority)
    return (found[2] if found else "") or _PORTS.get(scheme, "")


def _shown(values: list[str]) -> str:
    return ", ".join(repr(value[:120]) for value in values[:3]) or "missing"
