"""Jobs over HTTP: they start like any upload, and clients see their state."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.exchange.directory import DirectoryExchange
from knapper.ids import LOCAL_TENANT
from knapper.jobs.names import Start
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state.job_records import Spent, Trained, encode
from knapper.store.memory import MemoryStore
from tests.command import knapper
from tests.gateway.running import Running, gateway

YAML = "kind: sft\ndata: d.jsonl\nsteps: 3\n"
FILES = {"job.yaml": YAML, "d.jsonl": '{"prompt": "a", "completion": "b"}\n'}


class DoorbellLog:
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def post(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Running, DoorbellLog]]:
    store, doorbells = MemoryStore(), DoorbellLog()
    job_services = JobServices(
        store, DirectoryExchange(tmp_path), Notifier(doorbells.post, lambda: 0.0), iter(range(10**6)).__next__
    )
    with gateway(store, job_services=job_services) as running:
        yield running, doorbells


def submit(running: Running, **more: Any) -> Any:
    return running.post("jobs", {"name": "j", "files": {**FILES, **more}})


def test_a_job_is_submitted_listed_shown_cancelled_and_resumed(
    running: tuple[Running, DoorbellLog], tmp_path: Path
) -> None:
    http, doorbells = running
    made = submit(http)
    assert (made["job"], made["state"], made["kind"], made["step"], made["steps"]) == ("j", "running", "sft", 0, 3)
    assert (tmp_path / "inbox/local/j/job.yaml").read_text() == YAML
    assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]
    assert submit(http)["start"] == made["start"]
    assert len(doorbells.events) == 1, "the same again starts nothing"
    start = Start(LOCAL_TENANT, "j", made["start"])
    for step in range(2):
        record = Trained(
            next_seq=1, steps=3, metrics={"loss/mean": 1.0 / (step + 1)}, tokens=1, bytes=1, spent=Spent(),
            before_at=1.0, began_at=2.0, ended_at=5.0, device_s=1.25,
        )  # fmt: skip
        http.run(http.store.put_if_absent(start.trained(step), encode(record)))
    shown = http.http.get("jobs/j", params={"after": 1}).json()
    assert shown["step"] == 2
    times = {"at": "1970-01-01T00:00:05.000+00:00", "device_seconds": 1.25, "wall_seconds": 4.0}
    assert shown["metrics"] == [{"step": 2, "loss/mean": 0.5, **times}]
    (brief,) = http.http.get("jobs").json()["jobs"]
    assert (brief["job"], brief["step"], brief["steps"], brief["state"]) == ("j", 2, 3, "running")
    assert http.post("jobs/j/cancel")["state"] == "cancelled"
    assert '"cancelled"' in (tmp_path / "jobs/local/j/status.json").read_text()
    assert http.run(http.store.list("working/")) == []
    assert http.post("jobs/j/resume")["state"] == "running"
    assert http.run(http.store.list("working/")) == [start.working]
    assert [event.type for event in doorbells.events] == [
        cloudevents.JOB_STARTED,
        cloudevents.JOB_CANCELLED,
        cloudevents.JOB_STARTED,
    ]


def test_a_submit_says_whether_it_is_equal_and_again_starts_anew(running: tuple[Running, DoorbellLog]) -> None:
    http, doorbells = running
    first = submit(http)
    same = submit(http)
    assert (first["equal"], same["equal"], same["start"]) == (False, True, first["start"])
    refused = http.http.post("jobs", json={"name": "j", "files": FILES, "again": True})
    assert refused.status_code == 422
    assert "cancel it first" in refused.json()["detail"]
    http.post("jobs/j/cancel")
    anew = http.post("jobs", {"name": "j", "files": FILES, "again": True})
    assert (anew["equal"], anew["state"]) == (False, "running")
    assert anew["start"] != first["start"]
    data = next(name for name in FILES if name != "job.yaml")
    corrected = submit(http, **{data: FILES[data] + "\n"})
    assert (corrected["equal"], corrected["state"]) == (False, "running")
    assert corrected["start"] not in (first["start"], anew["start"])
    assert [event.type for event in doorbells.events].count(cloudevents.JOB_STARTED) == 3


def test_a_wrong_job_yaml_is_told_in_the_answer_and_in_the_list(running: tuple[Running, DoorbellLog]) -> None:
    http, doorbells = running
    made = submit(http, **{"job.yaml": "kind: sft\ndata: d.jsonl\nsteps: none\n"})
    assert made["state"] == "refused"
    assert (made["error"]["line"], made["error"]["field"], made["error"]["value"]) == (3, "steps", "'none'")
    (brief,) = http.http.get("jobs").json()["jobs"]
    assert "job.yaml, line 3: steps is 'none'" in brief["reason"]
    assert doorbells.events == []
    assert submit(http)["state"] == "running"


@pytest.mark.parametrize(
    ("name", "files", "field"),
    [
        ("../j", FILES, "job"),
        ("J", FILES, "job"),
        ("j" * 64, FILES, "name"),
        ("j", {"../job.yaml": "", **FILES}, "file"),
        ("j", {"a/b": "", **FILES}, "file"),
        ("j", {"d.jsonl": ""}, "files"),
        ("j", {}, "files"),
    ],
)
def test_names_that_are_no_plain_names_are_refused(
    running: tuple[Running, DoorbellLog], tmp_path: Path, name: str, files: dict[str, str], field: str
) -> None:
    refused = running[0].post("jobs", {"name": name, "files": files}, status=422)
    assert refused["detail"].startswith(field), refused
    assert list((tmp_path / "inbox").rglob("*")) == []


@pytest.mark.parametrize(
    ("lora", "adapts", "says"),
    [
        (
            "",
            ["attn", "mlp"],
            "adapts attn, mlp; not unembed, as the SDK's default does: `lora: {train_unembed: true}`",
        ),
        ("lora: {train_unembed: true, train_mlp: false}\n", ["attn", "unembed"], "adapts attn, unembed"),
    ],
)
def test_what_the_adapter_changes_is_told_beside_the_default_of_the_sdk(
    running: tuple[Running, DoorbellLog], tmp_path: Path, lora: str, adapts: list[str], says: str
) -> None:
    http, _ = running
    assert submit(http, **{"job.yaml": YAML + lora})["adapts"] == adapts
    http.post("jobs/j/cancel")
    assert json.loads((tmp_path / "jobs/local/j/status.json").read_text())["adapts"] == adapts
    assert says in command(http, "jobs", "show", "j").stdout.splitlines()


def test_jobs_are_told_as_json_whole(running: tuple[Running, DoorbellLog]) -> None:
    http, _ = running
    start = Start(LOCAL_TENANT, "j", submit(http)["start"])
    http.post("jobs", {"name": "i", "files": {"job.yaml": 'kind: "\\u202e"\n'}})
    for step in range(2):
        record = Trained(
            next_seq=1, steps=3, metrics={"loss/mean": 0.5}, tokens=1, bytes=1, spent=Spent(),
            began_at=0.0, ended_at=1.0,
        )  # fmt: skip
        http.run(http.store.put_if_absent(start.trained(step), encode(record)))
    listed = command(http, "jobs", "list", "--json")
    assert listed.stdout.isascii()
    assert json.loads(listed.stdout) == http.http.get("jobs").json()["jobs"]
    assert [job["state"] for job in json.loads(listed.stdout)] == ["refused", "running"]
    one = command(http, "jobs", "list", "--json", "--limit", "1")
    assert [job["job"] for job in json.loads(one.stdout)] == ["i"]
    assert "1 more" in one.stderr
    shown = json.loads(command(http, "jobs", "show", "j", "--json").stdout)
    assert [line["step"] for line in shown["metrics"]] == [1, 2]
    assert (shown["state"], shown["steps"]) == ("running", 3)
    refused = command(http, "jobs", "show", "i", "--json")
    assert (refused.returncode, json.loads(refused.stdout)["state"]) == (1, "refused")
    both = command(http, "jobs", "show", "j", "--json", "--follow")
    assert (both.returncode, both.stdout) == (2, "")


def test_empty_listings_say_so_and_what_to_do(running: tuple[Running, DoorbellLog]) -> None:
    http, _ = running
    assert command(http, "jobs", "list").stdout == "there are no jobs; `knapper submit JOB.YAML` starts one\n"
    assert command(http, "usage").stdout == "nothing was used in the last 24 hours; --hours looks further back\n"
    for listing in (["jobs", "list"], ["usage"]):
        assert json.loads(command(http, *listing, "--json").stdout) == []


def test_what_is_not_there_is_not_found(running: tuple[Running, DoorbellLog]) -> None:
    http = running[0]
    assert http.http.get("jobs/none").status_code == 404
    http.post("jobs/none/cancel", status=404)
    submit(http)
    http.post("jobs/j/resume", status=200)  # it runs already: nothing to do, no error
    assert http.http.get("jobs/j", params={"after": -1}).status_code == 422


def command(running: Running, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TINKER_BASE_URL": running.url, "TINKER_API_KEY": "tml-local"}
    return knapper(*arguments, environment=environment)


def test_the_command_line_submits_a_folder_and_follows_it(running: tuple[Running, DoorbellLog], tmp_path: Path) -> None:
    http, _ = running
    folder = tmp_path / "my-job"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "job.yaml").write_text(YAML.replace("3", "none"))
    wrong = command(http, "submit", str(folder / "job.yaml"))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "job.yaml, line 3: steps is 'none'" in wrong.stderr
    (folder / "job.yaml").write_text(YAML)
    done = command(http, "submit", str(folder / "job.yaml"))
    state, doing = done.stdout.splitlines()[:2]
    assert done.returncode == 0
    assert re.fullmatch(r"my-job: running, step 0/3, \d:\d\d", state)
    assert re.fullmatch(r"waiting for the engine, for \d:\d\d; no estimate before its first step", doing)
    assert "my-job  sft   running  0/3" in command(http, "jobs", "list").stdout
    assert command(http, "jobs", "cancel", "my-job").stdout.startswith("my-job: cancelled")
    followed = command(http, "jobs", "show", "my-job", "--follow")
    ended = r"my-job: cancelled, step 0/3, \d:\d\d\ncancelled by its owner\nadapts attn, mlp; "
    assert re.match(ended, followed.stdout), followed.stdout
    (folder / "d.jsonl").write_text("{}\n")
    (folder / "job.yaml").write_text(YAML + "seed: 1\n")
    refused = command(http, "submit", str(folder / "job.yaml"), "--follow")
    assert refused.returncode == 1
    assert "d.jsonl, line 1: messages" in refused.stdout
