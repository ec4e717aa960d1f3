from collections.abc import Callable, Iterator

import pytest

from knapper.settings import Settings
from knapper.store.gcs import GcsStore
from knapper.store.opening import open_store
from tests.store import emulator
from tests.store.emulator import Emulator

NewBucket = Callable[..., GcsStore]


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """One emulator for all tests of a worker."""
    with emulator.running(tmp_path_factory.mktemp("gcs") / "log") as started:
        yield started


@pytest.fixture
def new_bucket(gcs: Emulator, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> NewBucket:
    """Opens a store as every process does: in a new bucket, or in the one that is named."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)

    def make(address: str = "") -> GcsStore:
        address = address or f"gs://{gcs.make_bucket()}/some/prefix"
        store = open_store(Settings.load({"KNAPPER_STORE": address}))
        assert isinstance(store, GcsStore)
        request.addfinalizer(store.close)
        return store

    return make
