"""Samplers load what was saved, or nothing."""

import asyncio
from pathlib import Path

import pytest
import torch

from knapper.engine import checkpoint_format
from knapper.engine.models.config import ModelConfig
from knapper.errors import Corrupt
from knapper.serving.engine import StoredAdapters
from knapper.state.journal import bundles
from knapper.store.memory import MemoryStore
from tests.engine.tiny import tiny_model
from tests.sim.history import SPEC

PREFIX = "adapters/one/1/"


@pytest.mark.parametrize("part", [checkpoint_format.CONFIG, checkpoint_format.ADAPTER])
def test_an_adapter_of_other_bytes_than_were_saved_is_never_sampled_from(tmp_path: Path, part: str) -> None:
    async def story() -> None:
        store = MemoryStore()
        files = {checkpoint_format.CONFIG: b"{}", checkpoint_format.ADAPTER: bytes(64)}
        await bundles.write(store, PREFIX, files, spec=SPEC, seq=1, epoch=1)
        await store.delete(PREFIX + part)
        await store.put_if_absent(PREFIX + part, files[part][:-1] + b"\x01")  # as long as before
        adapters = StoredAdapters(store, ModelConfig.read(tiny_model(tmp_path)), torch.device("cpu"), torch.float32)
        with pytest.raises(Corrupt, match=rf"{part} is damaged: it is \d+ bytes that are others"):
            await adapters.load(PREFIX)

    asyncio.run(story())
