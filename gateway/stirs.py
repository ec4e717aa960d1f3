"""What makes work for a chore that has been resting says so here. Only for speed: `gateway.chores` works without."""

import asyncio
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stirs:
    """`jobs`: one was started, resumed, or waits for files. `inbox`: somebody uploads.

    `sweep`: files may have lost the last name that led to them. `accounts`: a run used something that no line has yet.
    """

    jobs: asyncio.Event = field(default_factory=asyncio.Event)
    sweep: asyncio.Event = field(default_factory=asyncio.Event)
    accounts: asyncio.Event = field(default_factory=asyncio.Event)
    inbox: asyncio.Event = field(default_factory=asyncio.Event)
