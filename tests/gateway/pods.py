"""Two train_step processes over one store, started as a pod's container starts them; each can be rung by itself."""

import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

import knapper
from knapper.events import cloudevents
from knapper.events.cloudevents import Claimed, Committed, Frame, Hint
from knapper.events.function_key import FunctionKey
from knapper.ids import RunId
from knapper.state.journal.accept import Acceptor, PackedBody, newest_manifest, pack
from knapper.state.journal.records import Creation, Kind, Spec
from knapper.state.journal.results import Results
from knapper.store.directory import DirectoryStore
from tests.conformance.kill_client import digest_of
from tests.engine.tiny import tiny_model
from tests.gateway.running import MODEL, fwdbwd

_ROOT = Path(knapper.__file__).parent.parent
_START_S = 60.0


class Pod:
    """One train_step. `address` is its own; empty in the settings where `routed` is false. `model`: else a tiny one.

    `root`: the checkout that it runs.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        routed: bool,
        model: Path | None = None,
        root: Path = _ROOT,
        **settings: str,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.data = directory / "data"
        self.log = directory / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KNAPPER_")}
        self._environment = environment | {
            "KNAPPER_DATA": str(self.data), "KNAPPER_MODEL": MODEL.name,
            "KNAPPER_MODEL_DIRECTORY": str(model or tiny_model(directory / "model")), "KNAPPER_THREADS": "1",
            "KNAPPER_DTYPE": "float32", "FUNCTION_TARGET": "train_step", "OMP_NUM_THREADS": "1",
            "KNAPPER_HOLDER_ADDRESS": self.address if routed else "",
            "FUNCTION_SOURCE": str(root / "functions" / "train_step" / "main.py"), "PYTHONPATH": str(root),
            **settings,
        }  # fmt: skip
        self._root = root
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "uvicorn", "functions_framework.aio:app", "--port", str(self.port), "--workers", "1",
            "--lifespan", "on", "--log-level", "warning",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self._environment, cwd=self._root, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it listens."""
        end = time.monotonic() + _START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    async def ring(self, run: RunId, hint: Hint | None = None) -> tuple[int, str, list[Frame]]:
        """(status, what an error said, the frames until the answer ended or broke off)."""
        headers, body = cloudevents.doorbell(run, f"bell-{time.monotonic_ns()}", hint).encode()
        headers |= await FunctionKey(DirectoryStore(self.data / "store"), lambda: secrets.token_hex(16)).headers()
        frames: list[Frame] = []
        async with (
            httpx.AsyncClient(trust_env=False, timeout=120) as client,
            client.stream("POST", self.address, headers=headers, content=body) as answer,
        ):
            if answer.status_code != 200:
                return answer.status_code, (await answer.aread()).decode(), frames
            async for frame in cloudevents.decode_frames(answer.aiter_bytes()):
                frames.append(frame)  # noqa: PERF401 - those before a break count
        return 200, "", frames


@dataclass(frozen=True)
class Two:
    """Both pods, their store, and what can be done with it."""

    store: DirectoryStore
    data: Path
    a: Pod
    b: Pod

    @property
    def acceptor(self) -> Acceptor:
        return Acceptor(self.store, time.time)

    async def make(self, name: str) -> RunId:
        run = RunId(f"ses-{hashlib.sha256(name.encode()).hexdigest()[:32]}:train:0")
        spec = Spec(
            run=run, tenant="local", base_model=MODEL.name, rank=4, alpha=32.0, seed=1,
            train_attn=True, train_mlp=True, train_unembed=False,
        )  # fmt: skip
        await self.acceptor.create(Creation(spec=spec), b"create")
        return run

    async def accept(self, run: RunId, seqs: Sequence[int], tokens: int = 24) -> None:
        for seq in seqs:
            await self.acceptor.accept(run, seq, *_operation(run, seq, tokens))

    async def accept_save(self, run: RunId, seq: int) -> None:
        body = {"model_id": run, "seq_id": seq, "path": "end"}
        await self.acceptor.accept(run, seq, "save_weights", pack(msgspec.json.encode(body)))

    async def hint(self, run: RunId, way: cloudevents.Way) -> Hint:
        """What a gateway that has just looked would send."""
        newest = await newest_manifest(self.store, run)
        return Hint() if newest is None else Hint(newest[1].holder, newest[1].epoch, way)

    async def holder(self, run: RunId) -> str:
        """Where it listens."""
        newest = await newest_manifest(self.store, run)
        assert newest is not None
        return newest[1].address

    async def answers(self, run: RunId, last: int) -> list[bytes]:
        """All of them; that of the save without the run's name."""
        results = Results(self.store)
        found = [await results.find(run, seq) for seq in range(1, last + 1)]
        assert all(found), [seq for seq, result in enumerate(found, 1) if result is None]
        return [result.body.replace(run.encode(), b"RUN") for result in found if result is not None]

    async def weights(self, run: RunId) -> str:
        """SHA-256 of the checkpoint that `accept_save` asked for."""
        return await digest_of(str(self.data), f"tinker://{run}/weights/end")


def _operation(run: RunId, seq: int, tokens: int) -> tuple[Kind, PackedBody]:
    if seq % 3 == 0:
        body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-2}}
        return "optim_step", pack(msgspec.json.encode(body))
    return "forward_backward", pack(fwdbwd(run, seq, tokens + seq % 5))


@contextmanager
def two(directory: Path, *, routed: bool) -> Iterator[Two]:
    """Both answering."""
    pods = [Pod(name, directory, routed=routed) for name in ("a", "b")]
    data = directory / "data"
    try:
        for pod in pods:
            pod.start()
        for pod in pods:
            pod.wait()
        yield Two(DirectoryStore(data / "store"), data, *pods)
    finally:
        for pod in pods:
            pod.stop()
    for pod in pods:
        assert "Traceback" not in pod.log.read_text(errors="replace"), pod.said()


def committed(frames: Sequence[Frame]) -> list[int]:
    return [result.seq for frame in frames if isinstance(frame, Committed) for result in frame.commit.results]


def claimed(frames: Sequence[Frame]) -> Claimed | None:
    return next((frame for frame in frames if isinstance(frame, Claimed)), None)
