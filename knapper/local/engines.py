"""Which process serves which function: one for all, with one copy of the base weights, or one for each."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from knapper.local import web
from knapper.local.dispatcher import Route
from knapper.local.process import Process
from knapper.local.service import Changed, Launch, Service

FUNCTIONS = ("train_step", "sample")


def shared(root: Path, environment: Mapping[str, str], idle_s: float, changed: Changed) -> dict[str, Route]:
    """Routes to one process for all functions."""
    sources = os.pathsep.join(str(_source(root, name)) for name in FUNCTIONS)
    launch = _launcher("shared:app", root / "functions", {**environment, "FUNCTION_SOURCES": sources})
    engine = Service("engine", launch, idle_s, changed)
    return {f"/{name}": Route(engine, f"/{name}") for name in FUNCTIONS}


def isolated(root: Path, environment: Mapping[str, str], idle_s: float, changed: Changed) -> dict[str, Route]:
    """Routes to one process for each function, under functions-framework's own entry, as on a cluster."""
    routes = {}
    for name in FUNCTIONS:
        own = {**environment, "FUNCTION_TARGET": name, "FUNCTION_SOURCE": str(_source(root, name))}
        launch = _launcher("functions_framework.aio:app", root, own)
        routes[f"/{name}"] = Route(Service(name, launch, idle_s, changed), "")
    return routes


def _source(root: Path, function: str) -> Path:
    return root / "functions" / function / "main.py"


def _launcher(application: str, directory: Path, environment: Mapping[str, str]) -> Launch:
    async def launch(listener: socket.socket) -> Process:
        return await web.start(application, directory, environment, listener)

    return launch
