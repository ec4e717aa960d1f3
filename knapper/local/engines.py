"""Which process serves which function: one for both engines, with one copy of the base weights, or one for each."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from knapper.local import web
from knapper.local.activator import Route
from knapper.local.on_demand import Changed, Launch, Service
from knapper.local.process import Process
from knapper.local.state import ENGINES

REWARD = "reward"  # never beside them: it needs no model, and starts processes for code of others
FUNCTIONS = (*ENGINES, REWARD)


def shared(root: Path, environment: Mapping[str, str], idle_s: float, changed: Changed) -> dict[str, Route]:
    """Routes to one process for all engines, and to one for rewards."""
    sources = os.pathsep.join(str(_source(root, name)) for name in ENGINES)
    launch = _launcher("shared:app", root / "functions", {**environment, "FUNCTION_SOURCES": sources})
    engine = Service("engine", launch, idle_s, changed)
    routes = {f"/{name}": Route(engine, f"/{name}") for name in ENGINES}
    return {**routes, f"/{REWARD}": _own(root, REWARD, environment, idle_s, changed)}


def isolated(root: Path, environment: Mapping[str, str], idle_s: float, changed: Changed) -> dict[str, Route]:
    """Routes to one process for each function, as on a cluster."""
    return {f"/{name}": _own(root, name, environment, idle_s, changed) for name in FUNCTIONS}


def _own(root: Path, name: str, environment: Mapping[str, str], idle_s: float, changed: Changed) -> Route:
    """A process for the function alone, under functions-framework's own entry."""
    own = {**environment, "FUNCTION_TARGET": name, "FUNCTION_SOURCE": str(_source(root, name))}
    return Route(Service(name, _launcher("functions_framework.aio:app", root, own), idle_s, changed), "")


def _source(root: Path, function: str) -> Path:
    return root / "functions" / function / "main.py"


def _launcher(application: str, directory: Path, environment: Mapping[str, str]) -> Launch:
    async def launch(listener: socket.socket) -> Process:
        return await web.start(application, directory, environment, listener)

    return launch
