"""Events that are posted to a Broker: taken or not, and no connection outlives its event."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from knapper.events import cloudevents
from knapper.events.broker import Broker
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.store.memory import MemoryStore
from tests.gateway.running import NOWHERE, serve

EVENT = Event(type=cloudevents.JOB_STARTED, subject="local/a/b", id="1")


@dataclass
class Channel:
    url: str
    taken: list[str]


@pytest.fixture
def channel() -> Iterator[Channel]:
    taken: list[str] = []

    async def take(request: Request) -> Response:
        taken.append(cloudevents.decode(request.headers, await request.body()).subject)
        return Response(status_code=202)

    async def lead_away(_: Request) -> Response:
        return RedirectResponse("/")

    async def refuse(_: Request) -> Response:
        return Response("full", 503)

    paths = {"/": take, "/away": lead_away, "/full": refuse}
    with serve(Starlette(routes=[Route(path, work, methods=["POST"]) for path, work in paths.items()])) as (url, _):
        yield Channel(url, taken)


def test_what_the_broker_takes_and_does_not_take(channel: Channel) -> None:
    key = FunctionKey(MemoryStore(), lambda: "0" * 32)

    async def story() -> list[bool]:
        urls = [f"{channel.url}/", f"{channel.url}/full", f"{channel.url}/away", NOWHERE, ""]
        return [await Broker(url, key).post(EVENT) for url in urls]

    assert asyncio.run(story()) == [True, False, False, False, False]
    assert channel.taken == ["local/a/b"], "what it was led away to is not asked"


POSTING = """
import asyncio, sys
from knapper.events import cloudevents
from knapper.events.broker import Broker
from knapper.events.function_key import FunctionKey
from knapper.store.memory import MemoryStore
key = FunctionKey(MemoryStore(), lambda: "0" * 32)
asyncio.run(Broker(sys.argv[1], key).post(cloudevents.Event(type=cloudevents.JOB_STARTED, subject="local/a/b", id="1")))
"""


def test_a_process_that_posted_leaves_nothing_open_and_says_nothing_at_its_end(channel: Channel) -> None:
    # A process of its own: in this one, what earlier tests left open would be collected here and blamed on the Broker.
    run = [sys.executable, "-W", "always::ResourceWarning", "-c", POSTING, f"{channel.url}/"]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "")
    assert channel.taken == ["local/a/b"]
