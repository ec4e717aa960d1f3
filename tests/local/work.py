"""A root with tiny functions, for real processes, and what the tests ask of those."""

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from knapper.local import engines, web
from knapper.local.activator import Dispatcher
from knapper.local.on_demand import Running, Service
from knapper.local.uvicorn_server import Server
from knapper.state.function_key import FunctionKey
from knapper.store.memory import MemoryStore

REPOSITORY = Path(__file__).parents[2]

# What its request's path says: frames one by one, an early death, or an echo. `notes` is a directory of the test's.
_FUNCTION = """
import asyncio, os, signal
from pathlib import Path
import functions_framework.aio
from starlette.responses import JSONResponse, StreamingResponse

NOTES = Path({notes!r})
if (NOTES / "broken").exists():
    raise RuntimeError("the weights are broken")

@functions_framework.aio.http
async def {name}(request):
    path, body = request.url.path, await request.body()
    with (NOTES / "deliveries").open("a") as file:
        print(path, body.decode(), file=file)
    if path.endswith("/frames"):
        return StreamingResponse(frames())
    if path.endswith("/die") or (path.endswith("/die-once") and not (NOTES / "died").exists()):
        (NOTES / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return JSONResponse({{"function": "{name}", "pid": os.getpid(), "path": path, "query": request.url.query,
                         "method": request.method, "body": len(body), "header": request.headers.get("ce-id")}})

async def frames():
    try:
        yield b"first\\n"
        while not (NOTES / "go").exists():
            await asyncio.sleep(0.01)
        yield b"second\\n"
    except BaseException:
        (NOTES / "left").touch()
        raise
"""


def make_root(tmp_path: Path) -> Path:
    """A root whose gateway is the real one and whose functions are tiny; their notes lie in its notes/."""
    root = tmp_path / "root"
    (root / "notes").mkdir(parents=True)
    for name in engines.FUNCTIONS:
        main = root / "functions" / name / "main.py"
        main.parent.mkdir(parents=True)
        main.write_text(_FUNCTION.format(name=name, notes=str(root / "notes")))
    shutil.copy(REPOSITORY / "functions" / "shared.py", root / "functions")
    (root / "gateway").symlink_to(REPOSITORY / "gateway")
    return root


class World:
    """A dispatcher that serves tiny functions, and a client of it."""

    def __init__(self, root: Path, client: httpx.AsyncClient, services: dict[str, Service]) -> None:
        self.notes = root / "notes"
        self.client = client
        self.services = services
        self.dispatcher: Dispatcher
        self.roles: dict[str, int] = {}  # what runs now

    def changed(self, name: str, running: Running | None) -> None:
        if running:
            self.roles[name] = running.process.pid
        else:
            self.roles.pop(name, None)

    async def pid(self, path: str = "/train_step") -> int:
        answer = await self.client.post(path)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["pid"])

    def deliveries(self) -> list[str]:
        return (self.notes / "deliveries").read_text().splitlines()


@asynccontextmanager
async def dispatching(root: Path, *, isolated: bool = False, idle_s: float = 60.0) -> AsyncIterator[World]:
    """The dispatcher on a loopback port, as the supervisor runs it, and a client that has the functions' key."""
    listener = web.bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    key = FunctionKey(MemoryStore(), lambda: secrets.token_hex(16))
    opening = await key.headers()
    async with httpx.AsyncClient(base_url=url, headers=opening, trust_env=False, timeout=60) as client:
        world = World(root, client, {})
        make = engines.isolated if isolated else engines.shared
        routes = make(root, dict(os.environ), idle_s, world.changed)
        world.services = {route.service.name: route.service for route in routes.values()}
        dispatcher = world.dispatcher = Dispatcher(routes, key)
        server = Server(dispatcher, listener)
        server.start()
        try:
            yield world
        finally:
            for service in world.services.values():
                await service.close()
            await server.stop()
            await dispatcher.close()
            listener.close()


async def until(condition: Callable[[], bool]) -> None:
    """Returns once it holds; a test that waits in vain meets its time-out."""
    while not condition():  # noqa: ASYNC110  files and processes ring no bell
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    """The process has ended (a zombie that nobody has reaped yet counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
