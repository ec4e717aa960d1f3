"""Events at the gateway: uploads start jobs once, ticks ring again, dead letters are stored; outsiders get 404."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from knapper import limits
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.exchange.directory import DirectoryExchange
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.local.broker.watcher import finalized
from knapper.state import dead_letters
from knapper.store.memory import MemoryStore
from tests.gateway.running import Running, gateway
from tests.gateway.test_jobs import FILES, DoorbellLog


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Running, DoorbellLog]]:
    store, doorbells = MemoryStore(), DoorbellLog()
    job_services = JobServices(
        store, DirectoryExchange(tmp_path), Notifier(doorbells.post, lambda: 0.0), iter(range(10**6)).__next__
    )
    with gateway(store, job_services=job_services) as running:
        yield running, doorbells


def put(root: Path, name: str, text: str) -> Event:
    path = root / "inbox" / "local" / "j" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return finalized(f"inbox/local/j/{name}", f"of {text}", len(text), 0.0)


def send(running: Running, event: Event, path: str = "/events", **headers: str) -> httpx.Response:
    given, body = event.encode()
    return httpx.post(f"{running.url}{path}", headers={**given, **headers}, content=body, timeout=30)


def test_uploads_in_any_order_start_a_job_once(running: tuple[Running, DoorbellLog], tmp_path: Path) -> None:
    http, doorbells = running
    first = put(tmp_path, "job.yaml", FILES["job.yaml"])
    assert send(http, first).status_code == 204
    assert doorbells.events == []
    second = put(tmp_path, "d.jsonl", FILES["d.jsonl"])
    for event in (second, second, first, second):
        answer = send(http, event)
        assert (answer.status_code, answer.content) == (204, b"")
    assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]
    assert doorbells.events[0].subject.startswith("local/j/")
    assert doorbells.events[0].kind == "sft"


def test_the_structured_mode_of_eventarc_is_taken_too(running: tuple[Running, DoorbellLog], tmp_path: Path) -> None:
    http, doorbells = running
    put(tmp_path, "d.jsonl", FILES["d.jsonl"])
    event = put(tmp_path, "job.yaml", FILES["job.yaml"])
    sent = {
        "specversion": "1.0", "type": event.type, "source": event.source, "id": "123456", "subject": event.subject,
        "time": "2026-11-23T00:00:00Z", "datacontenttype": "application/json", "data": json.loads(event.data),
    }  # fmt: skip
    headers = {"Content-Type": "application/cloudevents+json; charset=UTF-8"}
    answer = httpx.post(f"{http.url}/events", headers=headers, content=json.dumps(sent), timeout=30)
    assert answer.status_code == 204
    assert len(doorbells.events) == 1


def test_who_dies_between_the_start_and_its_bell_is_made_good_by_the_tick(
    running: tuple[Running, DoorbellLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, doorbells = running
    put(tmp_path, "d.jsonl", FILES["d.jsonl"])
    event = put(tmp_path, "job.yaml", FILES["job.yaml"])

    async def lost(event: Event) -> None:
        raise RuntimeError("died")

    with monkeypatch.context() as patch:
        patch.setattr(http.parts.job_services.notifier, "_post", lost)  # type: ignore[union-attr]  # there are job services
        assert send(http, event).status_code == 500
    assert send(http, event).status_code == 204
    assert doorbells.events == [], "it was started before"
    for _ in range(200):  # the job's clock moves a second each time that it is read
        assert send(http, Event(type="dev.knative.sources.ping", subject="", id="t")).status_code == 204
        if doorbells.events:
            break
    assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]


def test_an_idle_tick_rings_for_nobody(running: tuple[Running, DoorbellLog]) -> None:
    http, doorbells = running
    for _ in range(3):
        assert send(http, Event(type=cloudevents.TICK, subject="", id="t")).status_code == 204
    assert doorbells.events == []


@pytest.mark.parametrize(
    "event",
    [
        Event(type=cloudevents.ROLLOUTS_SCORED, subject="local/j/0123456789abcdef", id="1"),
        Event(type=cloudevents.OBJECT_FINALIZED, subject="objects/inbox/local/j/job.yaml", id="1", data=b"[]"),
        Event(type=cloudevents.OBJECT_FINALIZED, subject="objects/inbox/local/j/job.yaml", id="1"),
        finalized("inbox/local/j/job.yaml", "1", 1, 0.0, bucket="somebody-elses"),
    ],
)
def test_poison_is_answered_422(running: tuple[Running, DoorbellLog], event: Event) -> None:
    http, _ = running
    assert send(http, event).status_code == 422


@pytest.mark.parametrize(
    "name",
    ["jobs/local/j/bill.json", "inbox/x", "inbox/local/j/deeper/job.yaml", "inbox/LOCAL/j/job.yaml",
     "inbox/local/../job.yaml", "inbox/local/j/job.error.json", "x", "", "/", "inbox", "inbox/", "inbox//", "inbox///",
     "inbox//j/job.yaml", "/inbox/local/j/job.yaml", "inbox/local/j j/job.yaml"],
)  # fmt: skip
def test_what_is_no_file_of_a_job_is_nobodys_business(running: tuple[Running, DoorbellLog], name: str) -> None:
    http, doorbells = running
    before = http.run(http.store.list(""))
    assert send(http, finalized(name, "1", 1, 0.0)).status_code == 204
    assert doorbells.events == []
    assert http.run(http.store.list("")) == before


def test_dead_letters_are_kept_once_whatever_they_are(running: tuple[Running, DoorbellLog]) -> None:
    http, _ = running
    letter = Event(type=cloudevents.ROLLOUTS_SCORED, subject="local/j/x", id="7", source="knapper/reward")
    why = {"ce-knativeerrorcode": "422", "ce-knativeerrordest": "http://train-step", "ce-knativeerrordata": "no job"}
    for _ in range(3):
        assert send(http, letter, "/events/dead", **why).status_code == 204
    bare = {"ce-specversion": "1.0"}
    assert httpx.post(f"{http.url}/events/dead", content=b"\xff\x00 anything", headers=bare).status_code == 204
    first, second = http.run(dead_letters.listed(http.store))
    assert (first.attributes["id"], first.attributes["knativeerrorcode"]) == ("7", "422")
    assert second.body == b"\xff\x00 anything"
    for size, status in ((limits.event_bytes_max + 1, 413), (limits.event_bytes_max, 204)):
        sent = httpx.post(f"{http.url}/events/dead", content=b"x" * size, headers=bare, timeout=30)
        assert sent.status_code == status


def test_outside_there_is_nothing() -> None:
    tick = Event(type=cloudevents.TICK, subject="", id="t")
    with gateway(MemoryStore(), keys=True) as http:
        for path in ("/events", "/events/dead"):
            assert send(http, tick, path, Host="localhost.").status_code == 204, "this machine itself"
            assert send(http, tick, path, Host="knapper.example.com").status_code == 404
            assert send(http, tick, path, **{"X-Forwarded-For": "203.0.113.9"}).status_code == 404


@pytest.mark.parametrize("keys", [True, False])
def test_a_page_in_a_browser_of_this_machine_sends_no_event(keys: bool) -> None:
    """Neither one that says where it is from, nor a request so simple that its browser asks nobody before it."""
    tick = Event(type=cloudevents.TICK, subject="", id="t")
    with gateway(MemoryStore(), keys=keys) as http:
        before = http.run(http.store.list(""))
        for path in ("/events", "/events/dead"):
            for origin in ("https://attacker.example", "null"):
                assert send(http, tick, path, Origin=origin).status_code in (403, 404)
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                simple = httpx.post(
                    f"{http.url}{path}", content=b'{"specversion":"1.0"}', headers={"Content-Type": kind}
                )
                assert simple.status_code == 404
        assert http.run(http.store.list("")) == before


def test_on_a_cluster_events_come_under_the_name_that_only_the_cluster_serves() -> None:
    inside = "gateway.knapper.svc.cluster.local"
    tick = Event(type=cloudevents.TICK, subject="", id="t")
    with gateway(MemoryStore(), events_host=inside, keys=True) as http:
        for host in (inside, f"{inside}:80"):
            assert send(http, tick, Host=host).status_code == 204
        for host in ("127.0.0.1", "knapper.example.com", f"x.{inside}", f"{inside}.example.com"):
            assert send(http, tick, Host=host).status_code == 404


def test_what_is_put_back_is_looked_at_again(running: tuple[Running, DoorbellLog], tmp_path: Path) -> None:
    http, doorbells = running
    assert send(http, put(tmp_path, "d.jsonl", FILES["d.jsonl"])).status_code == 204
    assert send(http, put(tmp_path, "d.jsonl", "broken")).status_code == 204
    assert send(http, put(tmp_path, "job.yaml", FILES["job.yaml"])).status_code == 204
    assert (tmp_path / "inbox/local/j/job.error.json").exists()
    assert send(http, put(tmp_path, "d.jsonl", FILES["d.jsonl"])).status_code == 204
    assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]
    assert not (tmp_path / "inbox/local/j/job.error.json").exists()


def test_metrics_are_told_at_the_address_and_under_no_name() -> None:
    with gateway(MemoryStore(), keys=True) as http:
        assert httpx.get(f"{http.url}/metrics").status_code == 200
        assert httpx.get(f"{http.url}/metrics", headers={"Host": "knapper.example.com"}).status_code == 404


STRUCTURED = {"Content-Type": "application/cloudevents+json"}
OBJECT = {"specversion": "1.0", "type": cloudevents.OBJECT_FINALIZED, "source": "s", "id": "1", "subject": "objects/x"}
BEGUN = b'{"specversion": "1.0", "type": "t", "source": "s", "id": "1", "data": '
ODD = {
    "nested without end": b"[" * 100_000,
    "nested data": BEGUN + b"[" * 100_000,
    "nested data that ends": BEGUN + b"[" * 900 + b"]" * 900 + b"}",
    "half a pair": json.dumps({**OBJECT, "subject": "\ud800"}).encode(),
    "half a pair in its type": json.dumps({**OBJECT, "type": "\ud800"}).encode(),
    "half a pair in its data": json.dumps({**OBJECT, "data": {"bucket": "local", "name": "\ud800"}}).encode(),
    "no UTF-8": b'{"specversion": "1.0", "type": "\xff"}',
    "more digits than Python reads": b'{"specversion": "1.0", "type": ' + b"1" * 5000 + b"}",
    "a number as its name": json.dumps({**OBJECT, "data": {"bucket": "local", "name": 1}}).encode(),
    "a list as its version": json.dumps({**OBJECT, "specversion": []}).encode(),
    "lines in its subject": json.dumps({**OBJECT, "subject": "a\r\nb"}).encode(),
    "data in base64 that is none": json.dumps({**OBJECT, "data_base64": "\u00e9"}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("body", ODD.values(), ids=ODD.keys())
def test_what_no_parser_takes_is_poison_and_no_defect(running: tuple[Running, DoorbellLog], body: bytes) -> None:
    http, doorbells = running
    answer = httpx.post(f"{http.url}/events", headers=STRUCTURED, content=body, timeout=30)
    assert answer.status_code == 422, answer.text
    assert httpx.post(f"{http.url}/events/dead", headers=STRUCTURED, content=body, timeout=30).status_code == 204
    assert doorbells.events == []


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"bucket": "local", "name": "\\ud800"}', b"\xff", b'{"name": "x"}'])
def test_data_that_no_parser_takes_is_poison(running: tuple[Running, DoorbellLog], data: bytes) -> None:
    http, _ = running
    headers = {"ce-specversion": "1.0", "ce-type": cloudevents.OBJECT_FINALIZED, "ce-source": "s", "ce-id": "1"}
    for kind in ("application/json", "text/plain", ""):
        answer = httpx.post(f"{http.url}/events", headers={**headers, "Content-Type": kind}, content=data, timeout=30)
        assert answer.status_code == 422, answer.text
