"""The emulator of the trial on a cluster: in a directory it keeps what the store promises, through a kill too."""

import asyncio
from pathlib import Path

import pytest

from knapper.settings import Settings
from knapper.store.factory import open_store
from knapper.store.gcs import GcsStore
from tests.manifests.rendering import rendered
from tests.store.emulator import running


def opened(url: str, monkeypatch: pytest.MonkeyPatch) -> GcsStore:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    store = open_store(Settings.load({"KNAPPER_STORE": "gs://knapper"}))
    assert isinstance(store, GcsStore)
    return store


def test_objects_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seed/knapper").mkdir(parents=True)

    async def write(store: GcsStore) -> None:
        won = await asyncio.gather(*(store.put_if_absent("runs/a", bytes([n])) for n in range(24)))
        assert sum(won) == 1
        await store.put_if_absent("runs/b", b"b" * (1 << 20))
        await store.delete("runs/b")
        assert await store.put_if_absent("runs/b", b"again")

    async def read(store: GcsStore) -> None:
        assert await store.list("runs/") == ["runs/a", "runs/b"]
        assert not await store.put_if_absent("runs/a", b"second")
        assert len(await store.get("runs/a") or b"") == 1
        assert await store.get("runs/b") == b"again"

    for story in (write, read):
        with running(tmp_path / "log", tmp_path / "objects", tmp_path / "seed") as emulator:  # ended by a kill
            store = opened(emulator.url, monkeypatch)
            asyncio.run(story(store))
            store.close()


def test_the_manifest_keeps_objects_in_a_volume_that_outlives_the_container() -> None:
    (deployment,) = [thing for thing in rendered("overlays/local") if thing["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = dict(each.split("=", 1) for each in container["args"])
    assert arguments["-backend"] == "filesystem"
    (volume,) = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == arguments["-filesystem-root"]]
    assert {"name": volume, "emptyDir": {"sizeLimit": "20Gi"}} in pod["volumes"]
