"""Large files of a job, uploaded in parts: received parts are not sent again, and an incomplete file starts no job."""

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from knapper import limits
from knapper.exchange.directory import DirectoryExchange
from knapper.jobs import staging
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.store.memory import MemoryStore
from tests.gateway.running import Running, gateway
from tests.gateway.test_jobs import YAML, DoorbellLog, command

ROW = b'{"prompt": "a", "completion": "b"' + b" " * 3466 + b"}\n"  # wide: it is bytes that count here
DATA = ROW * 5000  # 17.5 MB: three parts
SHA256 = hashlib.sha256(DATA).hexdigest()
URL = f"uploads/{SHA256}/{len(DATA)}"
PART = limits.upload_part_bytes


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    store = MemoryStore()
    job_services = JobServices(
        store, DirectoryExchange(tmp_path / "data"), Notifier(DoorbellLog().post, lambda: 0.0), lambda: 1000.0
    )
    with gateway(store, job_services=job_services) as running:
        yield running


def put(running: Running, offset: int, data: bytes | None = None, **headers: str) -> httpx.Response:
    content = DATA[offset : offset + PART] if data is None else data
    return running.http.put(f"{URL}/{offset}", content=content, headers=headers)


def submitted(running: Running, status: int = 200, **changes: object) -> dict[str, object]:
    upload = {"sha256": SHA256, "size": len(DATA)} | changes
    body = {"name": "j", "files": {"job.yaml": YAML}, "uploads": {"d.jsonl": upload}}
    answer: dict[str, object] = running.post("jobs", body, status=status)
    return answer


def test_parts_come_in_any_order_and_once_they_are_all_there_the_job_starts(running: Running, tmp_path: Path) -> None:
    progress = running.http.get(URL).json()
    assert [(part["offset"], part["size"], part["received"]) for part in progress["parts"]] == [
        (0, PART, False), (PART, PART, False), (2 * PART, len(DATA) - 2 * PART, False),
    ]  # fmt: skip
    for offset in (2 * PART, 0):
        assert put(running, offset).status_code == 200
    assert [part["received"] for part in running.http.get(URL).json()["parts"]] == [True, False, True]
    missing = submitted(running, 404)
    assert f"1 of 3 parts are missing, the first at {PART}" in str(missing["detail"])
    assert not list((tmp_path / "data" / "inbox").rglob("*.*")), "nothing of it is where jobs start"
    digest = base64.b64encode(hashlib.sha256(DATA[PART : 2 * PART]).digest()).decode()
    assert put(running, PART, None, **{"Content-Digest": f"sha-256=:{digest}:"}).status_code == 200
    assert put(running, PART).status_code == 200, "once more is silent"
    first = submitted(running)
    assert (first["state"], first["equal"]) == ("running", False)
    assert (tmp_path / "data/inbox/local/j/d.jsonl").read_bytes() == DATA
    assert [path for path in (tmp_path / "data/uploads").rglob("*") if path.is_file()] == [], "the job has them"
    for offset in (0, PART, 2 * PART):
        put(running, offset)
    same = submitted(running)
    assert (same["start"], same["equal"]) == (first["start"], True)


def test_what_is_not_the_file_that_was_told_is_refused_and_can_be_sent_anew(running: Running, tmp_path: Path) -> None:
    wrong = put(running, 0, DATA[1 : PART + 1], **{"Content-Digest": f"sha-256=:{'A' * 43}=:"})
    assert (wrong.status_code, wrong.json()["detail"][:14]) == (422, "Content-Digest")
    assert not running.http.get(URL).json()["parts"][0]["received"]
    for offset in (0, PART, 2 * PART):
        assert put(running, offset, DATA[offset : offset + PART][::-1]).status_code == 200
    other = submitted(running, 422)
    assert str(other["detail"]).startswith("sha256 is"), other
    assert not (tmp_path / "data/inbox/local/j/job.yaml").exists()
    assert not any(part["received"] for part in running.http.get(URL).json()["parts"]), "so that they are sent anew"


@pytest.mark.parametrize(
    ("url", "content", "says"),
    [
        (f"{URL}/1", b"x", "offset is '1'"),
        (f"{URL}/{3 * PART}", b"x", "offset is"),
        (f"{URL}/-1", b"x", "offset is"),
        (f"{URL}/0", b"x", "the part's size is 1"),
        (f"uploads/{SHA256}/0/0", b"", "size is 0"),
        (f"uploads/{SHA256}/{limits.job_upload_bytes_max + 1}/0", b"x", "size is 268435457"),
        (f"uploads/{SHA256[1:]}/1/0", b"x", "sha256 is"),
        (f"uploads/{SHA256.upper()}/1/0", b"x", "sha256 is"),
    ],
)
def test_what_is_no_part_is_refused(running: Running, url: str, content: bytes, says: str) -> None:
    answer = running.http.put(url, content=content)
    assert (answer.status_code, answer.json()["detail"][: len(says)]) == (422, says)


def test_a_part_is_at_most_so_large(running: Running) -> None:
    assert put(running, 0, DATA[:PART]).status_code == 200
    assert put(running, 0, DATA[: PART + 1]).status_code == 413


def test_a_job_has_256_mib_and_not_a_byte_more(running: Running) -> None:
    size = limits.job_upload_bytes_max - len(YAML)
    assert "is not whole" in str(submitted(running, 404, size=size)["detail"])
    over = submitted(running, 413, size=size + 1)
    assert f"have {limits.job_upload_bytes_max + 1} bytes; allowed: {limits.job_upload_bytes_max}" in str(
        over["detail"]
    )


def test_a_tenant_stages_so_much_and_no_more(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "uploads_bytes_max", 2 * PART)
    assert [put(running, offset).status_code for offset in (0, PART, 2 * PART)] == [200, 200, 429]
    assert put(running, 0).status_code == 200, "one that is there already takes no more"
    refused = running.http.get(URL)
    assert refused.status_code == 429
    assert "no job has taken" in refused.json()["detail"]


def test_what_nobody_takes_expires(running: Running, tmp_path: Path) -> None:
    for offset in (0, PART):
        put(running, offset)
    old = next(path for path in (tmp_path / "data/uploads").rglob("000000000000"))
    os.utime(old, (1000.0, 1000.0))
    job_services = running.parts.job_services
    assert job_services is not None
    assert running.run(staging.expire(job_services.exchange, 1000.0 + limits.upload_s - 1)) == 0
    assert running.run(staging.expire(job_services.exchange, 1000.0 + limits.upload_s)) == 1
    assert [part["received"] for part in running.http.get(URL).json()["parts"]] == [False, True, False]


def test_the_command_line_sends_what_is_large_in_parts_and_only_what_is_missing(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "job.yaml").write_text(YAML)
    (folder / "d.jsonl").write_bytes(DATA)
    assert put(running, 0).status_code == 200
    staged = next(path for path in (tmp_path / "data/uploads").rglob("000000000000"))
    before = staged.stat().st_mtime_ns
    seen: list[str] = []
    (route,) = [each for each in running.app.routes if getattr(each, "path", "").endswith("{offset}")]
    handle = route.handle

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"].rpartition("/")[2])
        assert staged.stat().st_mtime_ns == before
        await handle(scope, receive, send)

    monkeypatch.setattr(route, "handle", watched)  # routes are the module's: others serve them too
    done = command(running, "submit", str(folder / "job.yaml"))
    assert (done.returncode, done.stdout.startswith("large: running, step 0/3")) == (0, True), done.stderr
    assert seen == [str(PART), str(2 * PART)]
    assert (tmp_path / "data/inbox/local/large/d.jsonl").read_bytes() == DATA
    (folder / "d.jsonl").write_bytes(DATA + b"\xff")
    wrong = command(running, "submit", str(folder))  # by its folder too
    assert (wrong.returncode, "d.jsonl" in wrong.stderr, "UTF-8" in wrong.stderr) == (1, True, True)
    with (folder / "d.jsonl").open("wb") as file:
        file.truncate(limits.job_upload_bytes_max)
    over = command(running, "submit", str(folder / "job.yaml"))
    assert (over.returncode, f"at most {limits.job_upload_bytes_max} in all" in over.stderr) == (1, True)
