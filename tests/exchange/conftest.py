"""Both exchanges, opened as every process opens them."""

from pathlib import Path

import pytest

from knapper.exchange import Exchange
from knapper.exchange.factory import open_exchange
from knapper.settings import Settings
from tests.store.emulator import Emulator, gcs

__all__ = ["gcs"]


@pytest.fixture(params=["directory", "bucket", "prefix"])
def exchange(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exchange:
    environ = {"KNAPPER_DATA": str(tmp_path / "data")}
    if request.param != "directory":
        emulator: Emulator = request.getfixturevalue("gcs")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        prefix = "/team/one" if request.param == "prefix" else ""
        environ["KNAPPER_EXCHANGE"] = f"gs://{emulator.make_bucket()}{prefix}"
    return open_exchange(Settings.load(environ))
