"""What a directory declares is what the catalogue serves, whatever it served before."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from starlette.testclient import TestClient

from gateway.app import create_app
from knapper import limits
from knapper.catalogue.declared_models import Declared, encode, read
from knapper.catalogue.served_models import Catalogue
from knapper.errors import InvalidField, NotFound
from knapper.state.model_record import ModelRecord, slug
from knapper.store.memory import MemoryStore
from tests.catalogue.test_served_models import RECORD
from tests.gateway.running import settings

OTHER = msgspec.structs.replace(RECORD, name="org/other", directory="")


def write(directory: Path, *records: ModelRecord) -> None:
    for record in records:
        (directory / f"{slug(record.name)}.json").write_text(encode(record))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, RECORD, OTHER)
    (tmp_path / "..data").mkdir()  # as a mounted ConfigMap has it
    (tmp_path / ".hidden.json").write_text("{")
    assert sorted(read(tmp_path), key=lambda record: record.name) == [RECORD, OTHER]


def test_the_catalogue_follows_the_directory(tmp_path: Path) -> None:
    async def story() -> None:
        store = MemoryStore()
        catalogue = Catalogue(store)
        declared = Declared(tmp_path, catalogue)
        write(tmp_path, RECORD, OTHER)
        assert sorted(await declared.publish()) == ["org/model", "org/other"]
        assert await catalogue.find("org/model") == RECORD
        versions = await store.list("models/")
        assert await declared.publish() == []  # nothing changed, nothing is written
        assert await store.list("models/") == versions
        (tmp_path / f"{slug('org/model')}.json").unlink()
        assert await declared.publish() == ["org/other"]
        with pytest.raises(NotFound, match="served: 'org/other'"):
            await catalogue.find("org/model")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "truncated"),
        ("{}", "missing required field"),
        (encode(RECORD).replace('"vocab"', '"vocabulary"'), "vocabulary"),
        (encode(RECORD).replace("49152", '"many"'), "vocab"),
        (encode(RECORD).replace("49152", "49152" + " " * 65536), "at most 65536 bytes"),
    ],
)
def test_a_file_that_is_no_model_is_named_and_keeps_the_gateway_from_starting(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InvalidField, match=words) as raised:
        read(tmp_path)
    assert "bad.json" in str(raised.value)
    with pytest.raises(InvalidField), TestClient(create_app(MemoryStore(), settings(models=str(tmp_path)))):
        pass


def test_one_model_twice_and_too_many_are_refused(tmp_path: Path) -> None:
    for number in range(limits.models_declared_max):
        write(tmp_path, msgspec.structs.replace(RECORD, name=f"org/{number}"))
    assert len(read(tmp_path)) == limits.models_declared_max
    write(tmp_path, RECORD)
    with pytest.raises(InvalidField, match=f"at most {limits.models_declared_max}"):
        read(tmp_path)
    for path in tmp_path.glob("*"):
        path.unlink()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(encode(RECORD))
    with pytest.raises(InvalidField, match="declared twice"):
        read(tmp_path)


def test_a_gateway_serves_what_is_declared_before_its_first_answer(tmp_path: Path) -> None:
    write(tmp_path, RECORD)
    app = create_app(MemoryStore(), settings(models=str(tmp_path)))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        answer = client.get("/api/v1/get_server_capabilities", headers={"X-API-Key": "tml-local"})
    served = answer.json()
    assert answer.status_code == 200, answer.text
    assert [model["model_name"] for model in served["supported_models"]] == ["org/model"]
