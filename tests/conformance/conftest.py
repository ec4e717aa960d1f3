"""One knapper for most tests, and clients of it."""

import asyncio
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from knapper.ids import LOCAL_TENANT, TinkerPath
from knapper.state.checkpoints import Checkpoints
from knapper.state.journal import bundles
from knapper.store.directory import DirectoryStore
from tests.conformance import data
from tests.conformance.server import Dtype, Server
from tests.engine.tiny import Kind, tiny_model
from tests.store.emulator import gcs

__all__ = ["gcs"]

os.environ.setdefault("TINKER_TELEMETRY", "0")

NewClient = Callable[..., tinker.TrainingClient]


def pytest_configure(config: pytest.Config) -> None:
    """The SDK leaves the connection of its first request to the garbage collector, whenever that comes."""
    for left in ("unclosed <socket", "unclosed transport"):
        config.addinivalue_line("filterwarnings", f"ignore:{left}:ResourceWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """And the last of them: pytest looks for them once more, with the filters that it began with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, sampler_name: str) -> Path:
    kind: Kind = "llama" if sampler_name == "torch" else "llama_wide"
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", kind=kind)


@pytest.fixture(scope="session")
def dtype() -> Dtype:
    """Of the server. test_bfloat16 has another, and runs in it what is compared with transformers and peft."""
    return "float32"


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory, sampler_name: str, dtype: Dtype) -> Iterator[Server]:
    settings = {"KNAPPER_SAMPLER": sampler_name}
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data", settings=settings, dtype=dtype) as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


NewService = Callable[[], tinker.ServiceClient]


@pytest.fixture
def new_service(server: Server) -> NewService:
    """Sessions of their own: close them, or use them as context managers."""
    return lambda: tinker.ServiceClient(base_url=server.url, api_key="tml-local")


@pytest.fixture
def service(new_service: NewService) -> Iterator[tinker.ServiceClient]:
    with new_service() as client:
        yield client


@pytest.fixture
def new_client(service: tinker.ServiceClient, model: Path) -> NewClient:
    """A run of rank 4 and seed 1, unless told otherwise."""

    def make(rank: int = 4, seed: int = 1, **train: bool) -> tinker.TrainingClient:
        return service.create_lora_training_client(str(model), rank=rank, seed=seed, **train).result()  # type: ignore[arg-type]  # flags

    return make


@pytest.fixture
def client(new_client: NewClient) -> tinker.TrainingClient:
    return new_client()


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run with some training behind it: its path, and its files as PEFT loads them."""

    path: str
    directory: Path


@pytest.fixture(scope="session")
def trained(server: Server, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(server, model, tmp_path_factory.mktemp("adapter"))


def train(server: Server, model: Path, directory: Path) -> Trained:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=4, seed=3).result()
        rng = np.random.default_rng(3)
        for _ in range(3):
            client.forward_backward(data.batch(rng), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-2))
        path = client.save_state("trained").result().path
    return Trained(path, exported(server, path, directory))


def exported(server: Server, path: str, directory: Path) -> Path:
    """The files of the checkpoint `path`, written to `directory`."""

    async def read() -> dict[str, bytes]:
        store = DirectoryStore(server.data / "store")
        checkpoint = await Checkpoints(store, time.time).resolve(TinkerPath.parse(path), LOCAL_TENANT)
        return (await bundles.read(store, checkpoint.bundle))[1]

    directory.mkdir(exist_ok=True)
    for name, content in asyncio.run(read()).items():
        (directory / name).write_bytes(content)
    return directory
