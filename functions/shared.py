"""One or several functions in one process, at /NAME/ each, under functions-framework, as `knapper up` runs them.

They share one copy of the base weights. The process ends when it is idle.

FUNCTION_SOURCES: paths of main.py files, joined by os.pathsep; each defines the function that its directory is named
after. Shared state lives in the library, since every main.py becomes sys.modules["main"].
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from functions_framework.aio import create_asgi_app
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from knapper.serving.idle import IdleTimeout
from knapper.settings import Settings


@asynccontextmanager
async def load(app: Starlette) -> AsyncIterator[None]:
    """Import every function before the port listens; one that fails to import ends the process."""
    for source in map(Path, os.environ["FUNCTION_SOURCES"].split(os.pathsep)):  # noqa: TID251  an entry point
        name = source.parent.name
        function: ASGIApp = create_asgi_app(name, os.fspath(source), "http")  # type: ignore[no-untyped-call]  # the library has no types here
        app.router.routes.append(Mount(f"/{name}", app=function))
    yield


app = IdleTimeout(Starlette(lifespan=load), Settings.load(os.environ).idle_s)  # noqa: TID251  an entry point
