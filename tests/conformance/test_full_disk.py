"""A full disk: the user reads why nothing moves, nothing is lost, and with room again everything goes on."""

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.conformance.kill_client import datum
from tests.conformance.server import Server, wait_until


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB, in memory."""
    disk = tmp_path / "small" / "disk"
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.timeout(180)
def test_a_full_disk_is_told_to_the_user_and_loses_nothing(
    small_disk: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Server.start(model, small_disk / "data") as server, caplog.at_level(logging.WARNING):
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        before = training.forward([datum(1)], "cross_entropy").result().metrics["loss:sum"]

        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        waiting = training.forward([datum(1)], "cross_entropy")
        wait_until(lambda: "the disk is full" in caplog.text, "the user is told", timeout_s=60)

        filler.unlink()
        assert waiting.result().metrics["loss:sum"] == before
        assert training.forward([datum(2)], "cross_entropy").result().metrics["loss:sum"] > 0
        service.close("success").result()
