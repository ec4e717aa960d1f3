"""Which process serves which functions: for each base model one with a copy of its weights, or two; and one for all."""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from knapper.local import web
from knapper.local.base_model import served
from knapper.local.on_demand import Changed, Service
from knapper.local.state import ENGINES, role_of
from knapper.settings import Settings
from knapper.state.model_record import ModelRecord, slug

Layout = Mapping[str, tuple[str, ...]]  # a process's role: its functions
Listeners = Mapping[str, socket.socket]  # by role

SHARED: Final[Layout] = {"engine": ENGINES}
ISOLATED: Final[Layout] = {name: (name,) for name in ENGINES}
# reward never shares a process with the engines: it needs no model, and starts processes for untrusted code
REWARD: Final[Layout] = {"reward": ("reward",)}


@dataclass(frozen=True)
class Engine:
    """The processes of one base model. `settings`: with that model, as its processes get them."""

    settings: Settings
    layout: Layout
    listeners: Listeners

    @classmethod
    def bind(cls, settings: Settings, layout: Layout, stack: ExitStack) -> Self:
        """Ports of its own, closed with the stack. Beside other models, the roles have the model's name in them."""
        if settings.engines > 1:
            layout = {role_of(process, settings.model): names for process, names in layout.items()}
        return cls(settings, layout, {role: stack.enter_context(web.bind("127.0.0.1", 0)) for role in layout})

    def record(self) -> ModelRecord:
        """Of its model, in the catalogue: requests go to the URLs in it."""
        return served(self.settings, urls(self.layout, self.listeners))


def urls(layout: Layout, listeners: Listeners) -> dict[str, str]:
    """The URL of each function."""
    return {name: f"{web.url(listeners[role])}/{name}/" for role, names in layout.items() for name in names}


def services(
    layout: Layout, root: Path, environment: Mapping[str, str], listeners: Listeners, changed: Changed
) -> list[Service]:
    """The processes. `root` holds functions/."""
    made = []
    for role, names in layout.items():
        process, _, model = role.partition(":")
        target = f"{process}-{slug(model)}" if model else process
        sources = os.pathsep.join(str(root / "functions" / name / "main.py") for name in names)
        own = {**environment, "FUNCTION_TARGET": target, "FUNCTION_SOURCES": sources}
        made.append(Service(role, "shared:app", root / "functions", own, listeners[role], changed))
    return made


def ports(listeners: Sequence[Listeners]) -> dict[str, int]:
    """The port of each role."""
    return {role: listener.getsockname()[1] for each in listeners for role, listener in each.items()}
