"""The published files of a job, over HTTP and the command line: listed, whole, in ranges, and resumed."""

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from gateway.ranges import Unsatisfiable, range_of
from knapper.errors import StoreError
from knapper.exchange.directory import DirectoryExchange
from knapper.ids import LOCAL_TENANT
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state import layout
from knapper.store.memory import MemoryStore
from tests.gateway.running import Running, gateway
from tests.gateway.test_jobs import YAML, DoorbellLog, command, submit

ADAPTER = bytes(range(256)) * 20_000  # 5 MB: several pieces
SHA256 = hashlib.sha256(ADAPTER).hexdigest()
FILE = "adapter/adapter_model.safetensors"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    store = MemoryStore()
    job_services = JobServices(
        store,
        DirectoryExchange(tmp_path / "data"),
        Notifier(DoorbellLog().post, lambda: 0.0),
        itertools.count(1000.0).__next__,
    )
    with gateway(store, job_services=job_services) as running:
        submit(running)
        publish(running, FILE, ADAPTER)
        yield running


def publish(running: Running, name: str, data: bytes, job: str = "j") -> None:
    job_services = running.parts.job_services
    assert job_services is not None
    running.run(job_services.exchange.publish(f"{layout.outputs(LOCAL_TENANT, job)}{name}", data))


def test_files_are_listed_with_what_they_are(running: Running) -> None:
    publish(running, "metrics.jsonl", b"{}\n")
    adapter, metrics, status = running.http.get("jobs/j/files").json()["files"]
    assert status["name"] == "status.json"
    assert (adapter["name"], adapter["size"], adapter["sha256"]) == (FILE, len(ADAPTER), SHA256)
    assert (metrics["name"], metrics["size"]) == ("metrics.jsonl", 3)
    assert metrics["sha256"] == hashlib.sha256(b"{}\n").hexdigest()
    assert running.http.get("jobs/none/files").status_code == 404


def test_a_file_is_fetched_whole_and_in_ranges(running: Running) -> None:
    url = f"jobs/j/files/{FILE}"
    whole = running.http.get(url)
    assert (whole.status_code, whole.content == ADAPTER) == (200, True)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-length"] == str(len(ADAPTER))
    digest = f"sha-256=:{base64.b64encode(bytes.fromhex(SHA256)).decode()}:"
    tag = whole.headers["etag"]
    for header, begin, end in (
        ("bytes=0-0", 0, 1), ("bytes=1000000-", 1_000_000, len(ADAPTER)), ("bytes=-7", len(ADAPTER) - 7, len(ADAPTER)),
        ("bytes=5-99999999999", 5, len(ADAPTER)), (f"bytes=0-{len(ADAPTER)}", 0, len(ADAPTER)),
    ):  # fmt: skip
        part = running.http.get(url, headers={"Range": header, "If-Range": tag})
        assert (part.status_code, part.content == ADAPTER[begin:end]) == (206, True), header
        assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(ADAPTER)}"
        assert part.headers["repr-digest"] == digest, "of the whole file"
    behind = running.http.get(url, headers={"Range": f"bytes={len(ADAPTER)}-"})
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{len(ADAPTER)}")
    assert running.http.get(url, headers={"If-None-Match": tag}).status_code == 304
    head = running.http.head(url, headers={"Range": "bytes=2-5"})
    assert (head.status_code, head.content, head.headers["content-length"]) == (206, b"", "4")


def test_a_range_of_another_version_is_the_whole_new_file(running: Running) -> None:
    url = f"jobs/j/files/{FILE}"
    tag = running.http.get(url).headers["etag"]
    publish(running, FILE, b"another")
    answer = running.http.get(url, headers={"Range": "bytes=2-", "If-Range": tag})
    assert (answer.status_code, answer.content) == (200, b"another")
    assert answer.headers["etag"] != tag


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None), ("bytes=0-4", (0, 5)), ("bytes=4-", (4, 10)), ("bytes=-3", (7, 10)), ("bytes=-99", (0, 10)),
        ("bytes=9-9", (9, 10)), ("bytes=5-4", None), ("bytes=0-1,3-4", None), ("lines=0-1", None), ("bytes=-", None),
        ("bytes=x", None), ("bytes=" + "9" * 30 + "-", None),
    ],
)  # fmt: skip
def test_what_a_range_asks_of_ten_bytes(header: str | None, expected: tuple[int, int] | None) -> None:
    assert range_of(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=11-12", "bytes=-0"])
def test_what_lies_behind_the_end_is_unsatisfiable(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        range_of(header, 10)


@pytest.mark.parametrize(
    "name",
    ["..%2f..%2f..%2fjob.yaml", "%2e%2e/%2e%2e/x", "%2fetc%2fpasswd", "adapter", "none", "a%00b", ".part", "a//b"],
)
def test_no_name_leads_out_of_the_job(running: Running, name: str) -> None:
    assert running.http.get(f"jobs/j/files/{name}").status_code == 404


def test_what_an_earlier_start_left_is_not_shown_as_the_newest_ones(running: Running, tmp_path: Path) -> None:
    old = tmp_path / "data" / "jobs" / "local" / "j" / "bill.json"
    old.write_bytes(b"{}")
    os.utime(old, (10.0, 10.0))  # before the job's clock said 1000
    names = [file["name"] for file in running.http.get("jobs/j/files").json()["files"]]
    assert names == [FILE, "status.json"]
    assert running.http.get("jobs/j/files/bill.json").status_code == 404


def test_the_command_line_fetches_files_and_goes_on_where_it_was_cut(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(running, "adapter/adapter_config.json", b"{}")
    publish(running, "bill.json", b"[]")
    listed = command(running, "jobs", "files", "j")
    assert f"{FILE}  4.9 MiB" in " ".join(listed.stdout.split(" ")).replace("   ", "  "), listed.stdout
    to = tmp_path / "to"
    fetched = command(running, "jobs", "download", "j", "adapter", "--to", str(to))
    assert fetched.returncode == 0, fetched.stderr
    assert sorted(path.name for path in to.rglob("*") if path.is_file()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert (to / FILE).read_bytes() == ADAPTER
    again = command(running, "jobs", "download", "j", FILE, "--to", str(to))
    assert "was already there" in again.stdout
    (to / FILE).write_bytes(b"torn")
    entry = next(file for file in running.http.get("jobs/j/files").json()["files"] if file["name"] == FILE)
    version = hashlib.sha256(f"{entry['sha256']} {entry['etag']}".encode()).hexdigest()[:16]
    part = (to / FILE).with_name(f".adapter_model.safetensors.{version}.part")
    part.write_bytes(ADAPTER[:3_000_000])
    ranges: list[str | None] = []
    _watch(running, ranges, monkeypatch)
    assert command(running, "jobs", "download", "j", FILE, "--to", str(to)).returncode == 0
    assert (to / FILE).read_bytes() == ADAPTER
    assert ranges == ["bytes=3000000-"]
    assert not part.exists()
    (to / FILE).unlink()
    part.write_bytes(b"x" * 3_000_000)  # spoiled on this disk: the sum does not fit, and it is fetched anew
    assert command(running, "jobs", "download", "j", FILE, "--to", str(to)).returncode == 0
    assert (to / FILE).read_bytes() == ADAPTER
    wrong = command(running, "jobs", "download", "j", "adaptr", "--to", str(to))
    assert wrong.returncode == 1
    assert "Did you mean adapter?" in wrong.stderr
    assert "bill.json" in wrong.stderr


def _watch(running: Running, ranges: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Range that a file is asked for with."""
    (route,) = [
        each for each in running.app.routes if getattr(each, "path", "") == "/api/v1/jobs/{job}/files/{file:path}"
    ]
    handle = route.handle

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        ranges.append(dict(scope["headers"]).get(b"range", b"").decode() or None)
        await handle(scope, receive, send)

    monkeypatch.setattr(route, "handle", watched)  # routes are the module's: others serve them too


def test_rollouts_are_printed_by_step_and_by_evaluation(running: Running) -> None:
    row = {
        "id": "a", "prompt": "2 + 2 =", "completion": "4\u2028!", "answer": "4", "tokens": 2, "stopped": True,
        "reward": 1.0, "parts": {}, "advantage": -0.5,
    }  # fmt: skip
    for n in (1, 2, 10):
        publish(running, f"rollouts/step-{n}.jsonl", json.dumps({**row, "id": f"s{n}"}, ensure_ascii=False).encode())
    publish(running, "rollouts/evaluation-0.jsonl", json.dumps({**row, "id": "e"}).encode())
    newest = json.loads(command(running, "jobs", "rollouts", "j", "--json").stdout)
    assert newest == [{**row, "id": "s10"}]
    assert json.loads(command(running, "jobs", "rollouts", "j", "--json", "--step", "2").stdout)[0]["id"] == "s2"
    assert json.loads(command(running, "jobs", "rollouts", "j", "--json", "--evaluation", "0").stdout)[0]["id"] == "e"
    header, line = command(running, "jobs", "rollouts", "j").stdout.splitlines()
    assert header.split() == ["REWARD", "ADVANTAGE", "TOKENS", "PROMPT", "COMPLETION"]
    assert line.split() == ["1", "-0.500", "2", "2", "+", "2", "=", "4\\u2028!"]
    missing = command(running, "jobs", "rollouts", "j", "--step", "3")
    assert (missing.returncode, "there are 1 to 10" in missing.stderr) == (1, True)


def test_a_job_is_deleted_with_all_its_bytes_and_can_be_submitted_anew(running: Running, tmp_path: Path) -> None:
    refused = running.http.delete("jobs/j")
    assert (refused.status_code, "allowed then: cancel" in refused.json()["detail"]) == (422, True)
    assert (tmp_path / "data/jobs/local/j" / FILE).exists()
    first = running.post("jobs/j/cancel")["start"]
    submit(running, **{"job.yaml": YAML + "seed: 1\n"})  # another start of the same name
    running.post("jobs/j/cancel")
    done = command(running, "jobs", "delete", "j")
    assert (done.returncode, done.stdout) == (0, "j: deleted\n")
    for where in ("inbox", "jobs"):
        assert [path for path in (tmp_path / "data" / where / "local" / "j").rglob("*") if path.is_file()] == []
    left = [name for name in running.run(running.store.list("")) if "/j/" in name]
    assert [name.split("/")[4] for name in left] == ["control"] * 4, "cancelled, deleted; twice"
    for reply in (running.http.get("jobs/j"), running.http.delete("jobs/j"), running.http.get("jobs/j/files")):
        assert reply.status_code == 404
    assert running.http.get("jobs").json()["jobs"] == []
    entries = running.http.get("audit").json()["entries"]
    assert [entry["event_details"]["job"] for entry in entries if entry["event"] == "job_delete"] == ["j"]
    anew = submit(running)
    assert (anew["state"], anew["equal"], anew["start"] != first) == ("running", False, True)
    assert running.run(running.store.get(f"jobs/local/j/{anew['start']}/started"))


def test_a_deletion_that_was_cut_off_is_finished_by_the_next(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.post("jobs/j/cancel")
    deleted, cut = running.store.delete, 3

    async def dies(name: str) -> None:
        nonlocal cut
        cut -= 1
        if cut == 0:
            raise StoreError("the store does not answer from here on")
        await deleted(name)

    status = 0
    for at in range(1, 8):
        cut = at
        with monkeypatch.context() as patch:
            patch.setattr(running.store, "delete", dies)
            status = running.http.delete("jobs/j").status_code
        if status == 200:
            break
        assert status == 503
        assert running.http.post("jobs/j/resume").status_code == 422, "it is deleted, if not yet gone"
    if status != 200:
        assert running.http.delete("jobs/j").status_code == 200
    assert running.http.get("jobs/j").status_code == 404
    assert submit(running)["state"] == "running"
