"""Which process serves which functions: one for both engines, with one copy of the base weights, or one for each."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from knapper.local import web
from knapper.local.on_demand import Changed, Service
from knapper.local.state import ENGINES

Layout = Mapping[str, tuple[str, ...]]  # a process's name: its functions

FUNCTIONS: Final = (*ENGINES, "reward")
# reward never shares a process with the engines: it needs no model, and starts processes for untrusted code
SHARED: Final[Layout] = {"engine": ENGINES, "reward": ("reward",)}
ISOLATED: Final[Layout] = {name: (name,) for name in FUNCTIONS}


def urls(layout: Layout, listeners: Mapping[str, socket.socket]) -> dict[str, str]:
    """The URL of each function."""
    return {name: f"{web.url(listeners[process])}/{name}/" for process, names in layout.items() for name in names}


def services(
    layout: Layout,
    root: Path,
    environment: Mapping[str, str],
    listeners: Mapping[str, socket.socket],
    changed: Changed,
) -> list[Service]:
    """The processes. `root` holds functions/; `listeners`: their sockets, by name."""
    made = []
    for process, names in layout.items():
        sources = os.pathsep.join(str(root / "functions" / name / "main.py") for name in names)
        own = {**environment, "FUNCTION_TARGET": process, "FUNCTION_SOURCES": sources}
        made.append(Service(process, "shared:app", root / "functions", own, listeners[process], changed))
    return made
