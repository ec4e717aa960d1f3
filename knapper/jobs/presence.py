"""Whether a function's process runs, where that is known."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Presence:
    """The state of a function's process. `since`: seconds since the epoch, known while it loads."""

    state: Literal["absent", "loading", "ready"]
    since: float | None = None


Present = Callable[[str, str], Presence | None]  # by function and base model; None: unknown, as on a cluster


def silent_as(function: Presence | None) -> str:
    """Why a function that was called says nothing yet, in words."""
    if function is None:
        return "starting from zero, or busy"
    return "busy" if function.state == "ready" else "starting from zero"
