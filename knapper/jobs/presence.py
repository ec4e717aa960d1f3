"""Whether a function's process runs, as far as that can be known."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Presence:
    """Of the process that serves a function. `since`: seconds since the epoch, known of one that loads."""

    state: Literal["absent", "loading", "ready"]
    since: float | None = None


Present = Callable[[str], Presence | None]  # by the function's name; None: nobody knows, as on a cluster
