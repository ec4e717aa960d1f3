"""Files of checkpoints over raw HTTP: listed with their digests, and served whole or in ranges."""

import hashlib

import msgspec
import pytest

from knapper.ids import CheckpointKind, TinkerPath
from knapper.state.checkpoints import Checkpoints
from tests.gateway import saved
from tests.gateway.running import MODEL, Running
from tests.gateway.test_rest_checkpoints import url

NAME = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_files_of_every_kind_are_listed_and_served(running: Running, kind: CheckpointKind) -> None:
    path = saved.save(running, running.make_run(), "a", kind)
    listed = running.http.get(url(path, "/files")).raise_for_status().json()
    assert (listed["tinker_path"], listed["base_model"]) == (path, MODEL.name)
    assert listed["files"] == [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in saved.FILES.items()
    ]
    for name, content in saved.FILES.items():
        assert running.http.get(url(path, f"/files/{name}")).raise_for_status().content == content


def test_a_download_resumes_where_it_broke_off(running: Running) -> None:
    path, content = saved.save(running, running.make_run(), "a"), saved.FILES[NAME]
    whole = running.http.get(url(path, f"/files/{NAME}"))
    assert whole.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    headers = {"Range": "bytes=300-", "If-Range": whole.headers["etag"]}
    rest = running.http.get(url(path, f"/files/{NAME}"), headers=headers)
    assert (rest.status_code, rest.content) == (206, content[300:])
    other = running.http.get(url(path, f"/files/{NAME}"), headers={**headers, "If-Range": '"of another save"'})
    assert (other.status_code, other.content) == (200, content)


def test_a_file_of_which_nothing_is_sent_is_not_read(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    tag = f'"{hashlib.sha256(saved.FILES[NAME]).hexdigest()}"'
    checkpoint = running.run(Checkpoints(running.store, running.parts.clock).resolve(TinkerPath.parse(path), "local"))
    running.run(running.store.delete(checkpoint.bundle + NAME))
    for headers, status in (({"If-None-Match": tag}, 304), ({"Range": "bytes=99999999-"}, 416)):
        assert running.http.get(url(path, f"/files/{NAME}"), headers=headers).status_code == status
    assert "is missing" in running.http.get(url(path, f"/files/{NAME}")).json()["detail"], "no bytes of a damaged one"


def test_files_need_the_owner_or_a_public_checkpoint(running: Running) -> None:
    run = saved.others_run(running)
    private = saved.save(running, run, "private", tenant=saved.OTHER)
    public = saved.save(running, run, "public", tenant=saved.OTHER, public=True, seq=2)
    for ending in ("/files", f"/files/{NAME}"):
        assert running.http.get(url(private, ending)).status_code == 404
        assert running.http.get(url(public, ending)).status_code == 200


def test_what_cannot_be_served_says_what_can(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    missing = running.http.get(url(path, "/files/model.safetensors"))
    assert missing.status_code == 404
    assert "there are: adapter_config.json, adapter_model.safetensors" in missing.json()["detail"]
    closed = encrypted(running, path)
    for ending in ("/files", f"/files/{NAME}"):
        refused = running.http.get(url(closed, ending))
        assert refused.status_code == 422
        assert "get_external_weights_urls" in refused.json()["detail"]


def encrypted(running: Running, path: str) -> str:
    """A checkpoint of the same files, whose downloads are encrypted."""
    store = Checkpoints(running.store, running.parts.clock)
    plain = running.run(store.resolve(TinkerPath.parse(path), "local"))
    closed = path.replace("/weights/a", "/external_weights/closed")
    running.run(store.save(msgspec.structs.replace(plain, path=closed, recipients=["age1x"]), overwrite=False))
    return closed
