"""One or several functions in one process, at /NAME/ each, under functions-framework: `knapper up`'s, and of a pod.

They share one copy of the base weights. The process ends when it is idle. Knative ends a pod's by itself, and the first
function there answers at / and /metrics too, as the only one of a pod does.

FUNCTION_SOURCES: paths of main.py files, joined by os.pathsep; each defines the function that its directory is named
after. Shared state lives in the library, since every main.py becomes sys.modules["main"].
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from functions_framework.aio import create_asgi_app
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from knapper.serving.idle import IdleTimeout
from knapper.settings import Settings

IN_A_POD: Final = "K_SERVICE" in os.environ  # noqa: TID251  an entry point


@asynccontextmanager
async def load(app: Starlette) -> AsyncIterator[None]:
    """Import every function before the port listens; one that fails to import ends the process."""
    functions: dict[str, ASGIApp] = {}
    for source in map(Path, os.environ["FUNCTION_SOURCES"].split(os.pathsep)):  # noqa: TID251  an entry point
        name = source.parent.name
        function: ASGIApp = create_asgi_app(name, os.fspath(source), "http")  # type: ignore[no-untyped-call]  # the library has no types here
        functions[f"/{name}"] = function
    app.router.routes.extend(Mount(path, app=function) for path, function in functions.items())
    if IN_A_POD:
        app.router.routes.extend(Route(path, next(iter(functions.values()))) for path in ("/", "/metrics"))
    yield


app: ASGIApp = Starlette(lifespan=load)
if not IN_A_POD:
    app = IdleTimeout(app, Settings.load(os.environ).idle_s)  # noqa: TID251  an entry point
