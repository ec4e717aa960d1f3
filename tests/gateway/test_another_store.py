"""A store that is emptied under a running gateway: that ends by itself, and the next one serves what it did."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from knapper.catalogue.declared_models import Declared, encode
from knapper.catalogue.served_models import Catalogue
from knapper.events.function_key import FunctionKey
from knapper.store.memory import MemoryStore
from tests.gateway.running import MODEL, NOWHERE, create_model, gateway

_START_S = 60.0


@contextmanager
def started(data: Path, models: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A gateway of a cluster: its models are declared in files, and nobody else publishes them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment = {
            **os.environ, "KNAPPER_DATA": str(data), "KNAPPER_MODELS": str(models), "KNAPPER_TRAIN_STEP_URL": NOWHERE,
            "KNAPPER_SAMPLE_URL": NOWHERE, "KNAPPER_PORT": str(listener.getsockname()[1]),
        }  # fmt: skip
        command = [sys.executable, "-m", "uvicorn", "gateway.app:app", "--fd", str(listener.fileno()), "--ws", "none"]
        process = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()])
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1/"
        headers = {"X-API-Key": "tml-local"}
        with process, httpx.Client(base_url=url, headers=headers, timeout=_START_S) as client:
            try:
                yield process, client
            finally:
                process.kill()


def served(client: httpx.Client) -> list[str]:
    reply = client.get("get_server_capabilities").raise_for_status().json()
    return [each["model_name"] for each in reply["supported_models"]]


@pytest.mark.parametrize("another", ["empty", "with a key of its own"])
def test_a_gateway_whose_store_was_replaced_ends_and_the_next_serves_its_models(another: str, tmp_path: Path) -> None:
    data, models = tmp_path / "data", tmp_path / "models"
    models.mkdir()
    (models / "tiny.json").write_text(
        encode(msgspec.structs.replace(MODEL, train_step_url=NOWHERE, sample_url=NOWHERE))
    )
    with started(data, models) as (process, client):
        assert served(client) == [MODEL.name]
        shutil.rmtree(data / "store")
        if another == "with a key of its own":
            with started(tmp_path / "other", models) as (_, other):
                served(other)
            shutil.rmtree(tmp_path / "other/store/models")
            shutil.copytree(tmp_path / "other/store", data / "store")
        assert served(client) == []
        process.wait(60)
    with started(data, models) as (process, client):
        assert served(client) == [MODEL.name]
        assert client.post("create_session", json={"tags": []}).raise_for_status().json()["session_id"]
        assert process.poll() is None


def test_a_model_that_is_missing_has_the_store_looked_at() -> None:
    with gateway() as running:
        body = create_model(running.session(), base_model="another/model")
        running.post("create_model", body, status=404)
        assert running.parts.wakeups.store.is_set()


def test_a_gateway_that_has_called_no_function_yet_notices_it_too(tmp_path: Path) -> None:
    """It has used no key by which it could tell: what it published is what is missing."""
    (tmp_path / "tiny.json").write_text(encode(MODEL))

    async def check() -> None:
        store = MemoryStore()
        declared = Declared(tmp_path, Catalogue(store))
        assert await declared.in_store(), "nothing was published yet"
        await declared.publish()
        assert await declared.in_store()
        assert await FunctionKey(MemoryStore()).in_store(), "a key that was never read says nothing"
        await Catalogue(store).serve_exactly([])
        assert await declared.in_store(), "a model that another one took off is no other store"
        for name in await store.list(""):
            await store.delete(name)
        assert not await declared.in_store()

    asyncio.run(check())
