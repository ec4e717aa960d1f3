"""The catalogue says what is served now, and keeps every version."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from knapper.catalogue.servable import record_of
from knapper.catalogue.served_models import Catalogue
from knapper.errors import NotFound
from knapper.state.model_record import ModelRecord, slug
from knapper.store.memory import MemoryStore

RECORD = ModelRecord(
    name="org/model", directory="/srv/models/org/model", tokenizer_id="/srv/models/org/model",
    context=8192, vocab=49152, arch="LlamaForCausalLM", dtype="float32", trainable=True, sampleable=True,
    train_step_url="http://127.0.0.1:1/train_step", sample_url="http://127.0.0.1:1/sample",
)  # fmt: skip


def test_a_model_is_found_by_name_and_by_directory() -> None:
    async def story() -> None:
        catalogue = Catalogue(MemoryStore())
        await catalogue.publish(RECORD)
        assert await catalogue.find("org/model") == RECORD
        assert await catalogue.find("/srv/models/org/model") == RECORD

    asyncio.run(story())


@pytest.mark.parametrize("asked", ["org/Model", "", "model"])
def test_an_unknown_model_is_refused_with_what_is_served(asked: str) -> None:
    async def story() -> None:
        catalogue = Catalogue(MemoryStore())
        with pytest.raises(NotFound, match="served: none"):
            await catalogue.find(asked)
        await catalogue.publish(msgspec.structs.replace(RECORD, directory=""))
        with pytest.raises(NotFound, match="served: 'org/model'"):
            await catalogue.find(asked)

    asyncio.run(story())


def test_a_version_is_written_only_when_something_changed() -> None:
    async def story() -> None:
        store = MemoryStore()
        catalogue = Catalogue(store)
        assert await catalogue.publish(RECORD)
        assert not await catalogue.publish(RECORD)
        moved = msgspec.structs.replace(RECORD, sample_url="http://127.0.0.1:2/sample")
        assert await catalogue.publish(moved)
        assert await catalogue.models() == [moved]
        assert len(await store.list(f"models/{slug('org/model')}/")) == 2

    asyncio.run(story())


def test_publishers_at_once_lose_no_version() -> None:
    async def story() -> None:
        store = MemoryStore()
        records = [msgspec.structs.replace(RECORD, context=n) for n in range(1, 9)]
        await asyncio.gather(*(Catalogue(store).publish(record) for record in records))
        assert len(await store.list("models/")) == 8
        assert (await Catalogue(store).find("org/model")) in records

    asyncio.run(story())


def test_a_model_that_nobody_serves_is_not_listed() -> None:
    async def story() -> None:
        catalogue = Catalogue(MemoryStore())
        await catalogue.publish(RECORD)
        await catalogue.publish(msgspec.structs.replace(RECORD, trainable=False, sampleable=False))
        assert await catalogue.models() == []
        with pytest.raises(NotFound):
            await catalogue.find("org/model")

    asyncio.run(story())


def test_a_tokenizer_is_named_as_its_model_is(tmp_path: Path) -> None:
    """By the name, which means something on every machine; by a directory only if that is what the user gave."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("org/model", str(tmp_path)):
        record = record_of(tmp_path, name, dtype="auto", train_step_url="", sample_url="")
        assert (record.tokenizer_id, record.directory) == (name, str(tmp_path))
