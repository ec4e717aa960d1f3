"""What makes work for a chore that has been resting says so here. Only for speed: `gateway.periodic` works without."""

import asyncio
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stirs:
    """`jobs`: one was started, resumed, or waits for files. `inbox`: somebody uploads.

    `collect`: something may be needed no more. `accounts`: a run used something that no line has yet.
    """

    jobs: asyncio.Event = field(default_factory=asyncio.Event)
    collect: asyncio.Event = field(default_factory=asyncio.Event)
    accounts: asyncio.Event = field(default_factory=asyncio.Event)
    inbox: asyncio.Event = field(default_factory=asyncio.Event)
