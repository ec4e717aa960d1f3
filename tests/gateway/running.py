"""A gateway on a real port, over a store that the test can read, and requests to it as the SDK sends them."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.routing import Door
from gateway.services import Services
from knapper.catalogue.served_models import Catalogue
from knapper.ids import RunId
from knapper.jobs.services import JobServices
from knapper.local.web import PROTOCOL
from knapper.settings import Settings
from knapper.state import layout
from knapper.state.journal.records import Operation, decode
from knapper.state.model_record import ModelRecord
from knapper.store import Store
from knapper.store.memory import MemoryStore
from knapper.wire import proto
from knapper.wire.types import Datum, ForwardBackward

MODEL = ModelRecord(
    name="tiny/model", directory="/models/tiny/model/x", tokenizer_id="tiny/model", context=512, vocab=300,
    arch="llama", dtype="float32", trainable=True, sampleable=True, train_step_url="", sample_url="",
    computed_by="native",
)  # fmt: skip


@dataclass
class Running:
    url: str
    store: Store
    app: Starlette
    loop: asyncio.AbstractEventLoop
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"X-API-Key": "tml-local", "Accept": "application/x-protobuf, application/json"}
        self.http = httpx.Client(base_url=f"{self.url}/api/v1/", headers=headers, timeout=60)

    @property
    def parts(self) -> Services:
        parts: Services = self.app.state.services
        return parts

    def door(self, path: str) -> Door:
        """The route of POSTs to /api/v1/`path`."""
        doors = [each for each in self.app.routes if isinstance(each, Door) and each.path == f"/api/v1/{path}"]
        return doors[0]

    def run(self, coroutine: Any) -> Any:
        """Run it where the gateway runs."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def post(self, path: str, json: Any = None, status: int = 200, **more: Any) -> Any:
        reply = self.http.post(path, json=json, **more)
        assert reply.status_code == status, reply.text
        return reply.json()

    def session(self) -> str:
        body: dict[str, Any] = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}
        created: str = self.post("create_session", body)["session_id"]
        return created

    def make_run(self, session: str | None = None, model_seq_id: int = 0) -> str:
        body = create_model(session or self.session(), model_seq_id)
        return str(self.post("create_model", body)["model_id"])

    def forward_backward(self, body: bytes, **headers: str) -> httpx.Response:
        return self.http.post(
            "forward_backward", content=body, headers={"Content-Type": "application/x-protobuf", **headers}
        )

    def stored(self, run: str, seq: int) -> Operation | None:
        name = layout.operation(RunId(run), seq)
        data = self.run(self.store.get(name))
        return None if data is None else decode(data, Operation, name)


def create_model(session: str, model_seq_id: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "session_id": session, "model_seq_id": model_seq_id, "base_model": MODEL.name, "lora_config": {"rank": 4},
        "optimizer_config": {"type": "adamw"}, "type": "create_model",
    } | changes  # fmt: skip


def fwdbwd(run: str, seq: int, tokens: int = 3) -> bytes:
    targets: NDArray[Any] = np.arange(tokens, dtype=np.int64) + 1
    inputs = {"target_tokens": targets, "weights": np.ones(tokens, np.float32)}
    datum = Datum(tokens=np.arange(tokens, dtype=np.int32), inputs=inputs)
    return proto.encode_forward_backward(ForwardBackward(run, seq, [datum], "cross_entropy", {}, False))


@contextlib.contextmanager
def serve(app: Any) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The app on a free port, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as `knapper up` has it: else 40 ms an answer
    config = uvicorn.Config(
        app, http=PROTOCOL, ws="none", lifespan="on", log_level="warning", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []
    started = threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        started.set()
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    started.wait(10)
    while not server.started and thread.is_alive():
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", loops[0]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@contextlib.contextmanager
def gateway(
    store: Store | None = None,
    *,
    model: ModelRecord | None = MODEL,
    job_services: JobServices | None = None,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    **changes: Any,
) -> Iterator[Running]:
    """`changes`: of the settings."""
    store = store if store is not None else MemoryStore()
    if model is not None:
        asyncio.run(Catalogue(store).publish(model))
    app = create_app(store, settings(**changes), job_services=job_services, clock=clock, monotonic=monotonic)
    with serve(app) as (url, loop):
        running = Running(url, store, app, loop)
        with running.http:
            yield running


def settings(**changes: Any) -> Settings:
    """Of a gateway whose functions are nowhere, with these changes."""
    default = Settings.load({"KNAPPER_TRAIN_STEP_URL": NOWHERE, "KNAPPER_SAMPLE_URL": NOWHERE})
    return msgspec.structs.replace(default, **changes)


NOWHERE = "http://127.0.0.1:9/"  # discard: nothing listens


def json_of(body: bytes) -> Any:
    return msgspec.json.decode(body)
