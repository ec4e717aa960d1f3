"""A root with tiny functions, for real processes, and what the tests ask of those."""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from knapper.local import engines, web
from knapper.local.process import Process
from knapper.local.state import ENGINES

REPOSITORY = Path(__file__).parents[2]

# What its request's path says: frames one by one, a death, or an echo. `notes` is a directory of the test's.
_FUNCTION = """
import asyncio, os, signal, time
from pathlib import Path
import functions_framework.aio
from starlette.responses import JSONResponse, StreamingResponse

NOTES = Path({notes!r})
if (NOTES / "broken").exists():
    raise RuntimeError("the weights are broken")
while (NOTES / "hangs").exists():
    time.sleep(0.01)

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
    for name in (*ENGINES, "reward"):
        main = root / "functions" / name / "main.py"
        main.parent.mkdir(parents=True)
        main.write_text(_FUNCTION.format(name=name, notes=str(root / "notes")))
    shutil.copy(REPOSITORY / "functions" / "shared.py", root / "functions")
    (root / "gateway").symlink_to(REPOSITORY / "gateway")
    return root


class World:
    """Tiny functions that run on demand, and a client of them."""

    def __init__(self, root: Path, client: httpx.AsyncClient, urls: dict[str, str]) -> None:
        self.notes = root / "notes"
        self.client = client
        self.urls = urls
        self.processes: dict[str, Process] = {}  # what runs now

    @property
    def roles(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.processes.items()}

    def changed(self, name: str, process: Process | None, ready: bool) -> None:
        if process:
            self.processes[name] = process
        else:
            del self.processes[name]

    async def post(self, function: str = "train_step", path: str = "", **given: Any) -> httpx.Response:
        return await self.client.post(self.urls[function] + path, **given)

    async def pid(self, function: str = "train_step") -> int:
        answer = await self.post(function)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["pid"])

    @asynccontextmanager
    async def frames(self) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of an answer that goes on once `go` is noted."""
        async with self.client.stream("POST", self.urls["train_step"] + "frames") as answer:
            yield answer.aiter_lines()

    def connect(self, function: str = "train_step") -> socket.socket:
        """A caller that has connected, and says nothing yet."""
        url = httpx.URL(self.urls[function])
        return socket.create_connection((url.host, url.port or 0), timeout=30)

    def deliveries(self) -> list[str]:
        return (self.notes / "deliveries").read_text().splitlines()


@asynccontextmanager
async def on_demand(root: Path, *, isolated: bool = False, idle_s: float = 60.0) -> AsyncIterator[World]:
    """The functions as the supervisor runs them."""
    layout = {**(engines.ISOLATED if isolated else engines.SHARED), **engines.REWARD}
    with ExitStack() as sockets:
        listeners = {name: sockets.enter_context(web.bind("127.0.0.1", 0)) for name in layout}
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            world = World(root, client, engines.urls(layout, listeners))
            environment = {**os.environ, "KNAPPER_IDLE_S": str(idle_s)}
            services = engines.services(layout, root, environment, listeners, world.changed)
            keeping = [asyncio.create_task(service.keep()) for service in services]
            await asyncio.sleep(0)  # they listen
            try:
                yield world
            finally:
                for task in keeping:
                    task.cancel()
                await asyncio.wait(keeping)
                await asyncio.gather(*(service.stop() for service in services))
                assert all(task.cancelled() for task in keeping)


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
