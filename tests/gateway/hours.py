"""Hours of a real gateway in seconds: a loop whose time jumps to the next timer, and a store that counts its calls."""

import asyncio
import selectors
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from aiohttp import web

from gateway.app import create_app
from gateway.services import Services
from knapper.errors import KnapperError
from knapper.events import cloudevents
from knapper.jobs.services import JobServices
from knapper.serving import http as serving_http
from knapper.serving.runs import ClaimedRuns
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Machine
from knapper.store import Names, Store
from tests.gateway.running import create_model, settings
from tests.sim.history import TERMS

HOUR_S = 3600.0
BEGAN_AT = 1_800_000_000.0
_LISTED_MAX = 1000  # names that a bucket tells a request
_TRAVELS_S = 0.01  # what was sent on this machine has come after this
T = TypeVar("T")


class _Leaping(selectors.DefaultSelector):
    loop: "LeapingLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout is None or timeout <= 0:
            return ready or super().select(timeout)
        if self.loop.threads:
            return super().select(0.01)
        if self.loop.sockets and (ready := super().select(_TRAVELS_S)):
            return ready
        self.loop.now += timeout
        return []


class LeapingLoop(asyncio.SelectorEventLoop):
    """Where nothing is ready and no thread is at work, time leaps to the next timer; else it stands still."""

    def __init__(self) -> None:
        self.now, self.threads, self.sockets = 0.0, 0, False
        selector = _Leaping()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]
        self.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: object) -> None:
        self.threads -= 1


def lived(story: Callable[[], Awaitable[T]]) -> T:
    """What the story returns, which may take days."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(_awaited(story))


async def _awaited(story: Callable[[], Awaitable[T]]) -> T:
    return await story()


def clock() -> float:
    return BEGAN_AT + asyncio.get_running_loop().time()


@dataclass
class CountingStore:
    """`calls`: (verb, what), a listing of more than a thousand names as a bucket counts it. `what`: the name's kind."""

    store: Store
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def verbs(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for (verb, _), count in self.calls.items():
            counts[verb] += count
        return dict(counts)

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        self.calls["put", _what(name)] += 1
        return await self.store.put_if_absent(name, data)

    async def get(self, name: str) -> bytes | None:
        self.calls["get", _what(name)] += 1
        return await self.store.get(name)

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        names = await self.store.list(prefix, start_after, limit)
        self.calls["list", _what(prefix)] += max(1, -(-len(names) // _LISTED_MAX))
        return names

    async def delete(self, name: str) -> None:
        self.calls["delete", _what(name)] += 1
        await self.store.delete(name)


def _what(name: str) -> str:
    """runs/<run>/in/... is runs/in."""
    parts = name.split("/")
    return f"runs/{parts[2]}" if parts[0] == "runs" and len(parts) > 2 else parts[0]


@dataclass(frozen=True)
class Gateway:
    http: httpx.AsyncClient
    parts: Services

    async def post(self, path: str, json: Any = None) -> Any:
        return (await self.http.post(path, json=json)).raise_for_status().json()

    async def session(self) -> str:
        body: dict[str, Any] = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}
        return str((await self.post("create_session", body))["session_id"])

    async def run(self, session: str, n: int = 0) -> str:
        return str((await self.post("create_model", create_model(session, n)))["model_id"])

    async def step(self, run: str, seq: int, status: int = 200) -> None:
        """An optimizer step, accepted."""
        body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-4}, "type": "optim_step"}
        assert (await self.http.post("optim_step", json=body)).status_code == status

    async def result(self, run: str, seq: int) -> Any:
        """As the SDK waits for it."""
        while (
            answer := await self.http.post("retrieve_future", json={"request_id": f"{run}:{seq}"})
        ).status_code == 408:
            pass
        return answer.raise_for_status().json()

    async def live(self, session: str) -> None:
        """As the SDK does while its user thinks: a heartbeat every ten seconds, for ever."""
        while True:
            await self.post("session_heartbeat", {"session_id": session, "type": "session_heartbeat"})
            await asyncio.sleep(10.0)


@asynccontextmanager
async def gateway(store: Store, job_services: JobServices | None = None, **changes: Any) -> AsyncIterator[Gateway]:
    """The whole gateway with its periodic tasks, on the clock of the loop. `changes`: of its settings."""
    now = asyncio.get_running_loop().time
    app = create_app(store, settings(**changes), job_services=job_services, clock=clock, monotonic=now)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    headers = {"X-API-Key": "tml-local", "Accept": "application/x-protobuf, application/json"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/api/v1/", headers=headers) as http,
    ):
        yield Gateway(http, app.state.services)


@asynccontextmanager
async def engine(store: Store, machine: Machine[Any]) -> AsyncIterator[str]:
    """A train_step on a port of its own, in this very loop: where it is."""
    runs = ClaimedRuns(store, machine, Holder("engine", "", TERMS), clock)

    async def doorbell(request: web.Request) -> web.StreamResponse:
        event = cloudevents.decode(request.headers, await request.read())
        frames = runs.answer(cloudevents.run_of(event), event.hint)
        try:
            first = await anext(frames)
        except KnapperError as error:
            told = serving_http.error(error)
            return web.Response(body=bytes(told.body), status=told.status_code, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": cloudevents.FRAMES})
        await response.prepare(request)
        async for chunk in serving_http.stream(first, frames):
            await response.write(chunk)
        await response.write_eof()
        return response

    loop = asyncio.get_running_loop()
    assert isinstance(loop, LeapingLoop)
    loop.sockets = True
    app = web.Application()
    app.router.add_post("/", doorbell)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await web.SockSite(runner, listener).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        await runner.cleanup()
