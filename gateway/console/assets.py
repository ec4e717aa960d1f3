"""Scripts, styles and the icon: read once, named by their content, and sent to anyone."""

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.routing import Door
from knapper.errors import NotFound

_STATIC: Final = Path(__file__).parent / "static"
_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# The SHA-256 of what others made, as their packages in the npm registry have it: see static/README.md.
VENDORED: Final = {
    "htmx.min.js": "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130",
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


@dataclass(frozen=True)
class Asset:
    content: bytes
    media_type: str

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.content).digest()


@cache
def found() -> dict[str, Asset]:
    """By name: of requests, these names are looked up, and no path is made."""
    return {
        path.name: Asset(path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(_STATIC.iterdir())
        if path.suffix in _TYPES
    }


@cache
def url(name: str) -> str:
    """Another content has another URL, so that browsers keep it for good."""
    return f"/static/{name}?v={found()[name].sha256.hex()[:16]}"


@cache
def integrity(name: str) -> str:
    return f"sha256-{base64.b64encode(found()[name].sha256).decode()}"


async def serve(request: Request) -> Response:
    asset = found().get(request.path_params["name"])
    if asset is None:
        raise NotFound("there is no such file of the console")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(asset.content, media_type=asset.media_type, headers=headers)


ROUTES = [Door("/static/{name}", serve, methods=["GET"], body_bytes_max=0)]
