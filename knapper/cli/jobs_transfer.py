"""Uploads and downloads of job files, in parts, resuming where the last attempt was interrupted."""

import base64
import codecs
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from knapper.errors import InvalidField, Unavailable, UserError
from knapper.jobs import names
from knapper.store import files
from knapper.text.suggestions import did_you_mean

if TYPE_CHECKING:
    from knapper.cli.jobs_client import JobsClient

_CHUNK_BYTES: Final = 1024 * 1024
_TRIES, _PAUSE_S = 6, 0.5  # in a row without progress; each pause is twice the previous one
_CHANGES_MAX = 3  # of a file while it is fetched, such as metrics of a running job


@dataclass(frozen=True)
class Text:
    """A file to send: UTF-8 text of `size` bytes."""

    path: Path
    size: int
    sha256: str


def checked(path: Path) -> Text:
    """Read the whole file. Raises InvalidField if it cannot be read or is not text."""
    digest, decoder, size = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                digest.update(data)
                decoder.decode(data)
                size += len(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        wrong = f"{error.object[error.start]:#x} is near byte {size + error.start}"
        raise InvalidField("file", path.name, "a text in UTF-8", wrong) from error
    except OSError as error:
        raise InvalidField("file", str(path), "a file that can be read", str(error.strerror)) from error
    return Text(path, size, digest.hexdigest())


def send(client: "JobsClient", name: str, text: Text) -> None:
    """Send all missing parts. Raises Unavailable after too many attempts without progress."""
    url, tries, before = f"/uploads/{text.sha256}/{text.size}", 0, -1
    while True:
        missing: list[dict[str, Any]] = []
        try:
            upload = client.ask("GET", url)
            missing = [part for part in upload["parts"] if not part["received"]]
            if not missing:
                return
            tries, before = (0, len(missing)) if len(missing) != before else (tries, before)
            _send_parts(client, url, name, text, missing)
        except Unavailable as error:
            tries = _pause(tries, error)


def _send_parts(client: "JobsClient", url: str, name: str, text: Text, parts: Sequence[dict[str, Any]]) -> None:
    with text.path.open("rb") as file:
        for part in parts:
            file.seek(part["offset"])
            data = file.read(part["size"])
            if len(data) != part["size"]:
                raise InvalidField("file", name, f"as it was when this began, of {text.size} bytes", "Submit it again")
            if part["signed"] is not None:
                client.put_signed(part["signed"]["url"], data, part["signed"]["headers"])
            else:
                digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
                client.put(f"{url}/{part['offset']}", data, {"Content-Digest": f"sha-256=:{digest}:"})


def download(client: "JobsClient", job: str, wanted: Sequence[str], folder: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether it was fetched) of each wanted file, or file of a wanted folder; without any, of all.

    Raises UserError for a missing one, before anything is fetched.
    """
    for name in _chosen([file["name"] for file in client.files(job)], wanted):
        yield name, _current(client, job, name, folder)


def _chosen(there: Sequence[str], wanted: Sequence[str]) -> list[str]:
    for name in there:
        if not names.is_artifact(name):
            raise UserError(f"the server has a file {name!r}, which no job can publish; nothing is fetched")
    chosen = [name for name in there if not wanted]
    for want in wanted:
        matches = [name for name in there if name == want or name.startswith(want.rstrip("/") + "/")]
        if not matches:
            folders = {name.rpartition("/")[0] for name in there} - {""}
            shown = ", ".join([*sorted(folders), *(name for name in there if "/" not in name)]) or "it has none yet"
            raise InvalidField("FILE", want, shown, did_you_mean(want, [*there, *folders]))
        chosen += [name for name in matches if name not in chosen]
    return chosen


def _current(client: "JobsClient", job: str, name: str, folder: Path) -> bool:
    """Fetch the current version; the file may be replaced meanwhile. False if it was there already."""
    for _ in range(_CHANGES_MAX):
        file = next((file for file in client.files(job) if file["name"] == name), None)
        if file is None:
            break
        fetched = fetch(client, f"/jobs/{names.job(job)}/files/{quote(name)}", file, folder / name)
        if fetched is not None:
            return fetched
    raise UserError(f"{name} of job {job} changed during every attempt, or is gone; download it again later")


def fetch(client: "JobsClient", url: str, file: dict[str, Any], target: Path) -> bool | None:
    """False if `target` is the listed file already, None if the received bytes are not its.

    A partial download stays beside it, under its version, and is resumed.
    """
    if file["sha256"] and target.is_file() and _sha256(target) == file["sha256"]:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    version = hashlib.sha256(f"{file['sha256']} {file['etag']}".encode()).hexdigest()[:16]
    part, tries = target.with_name(f".{target.name}.{version}.part"), 0
    if part.is_symlink():  # somebody else's, in a folder of several accounts
        part.unlink()
    while not part.exists() or part.stat().st_size < file["size"]:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(client, url, file, part)
        except Unavailable as error:
            tries = _pause(tries, error) if part.stat().st_size <= before else 0
        else:
            break
    if part.stat().st_size != file["size"] or file["sha256"] not in (None, _sha256(part)):
        part.unlink()
        return None
    part.replace(target)
    return True


def _append(client: "JobsClient", path: str, file: dict[str, Any], part: Path) -> None:
    with files.append(part) as out:
        have = out.tell()
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": f'"{file["etag"]}"'}
        with client.stream(path, headers) as answer:
            if answer.status_code != 206:
                out.truncate(0)
            for data in answer.iter_bytes():
                out.write(data)
                out.flush()


def _pause(tries: int, error: Unavailable) -> int:
    """Wait, and count one more attempt. Raises the error after too many."""
    if tries + 1 >= _TRIES:
        raise error
    time.sleep(_PAUSE_S * 2**tries)
    return tries + 1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
