"""Audit, usage and traces over raw HTTP."""

import urllib.request
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from knapper import limits
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Commit, Result, encode
from tests.gateway import saved
from tests.gateway.running import MODEL, Running, fwdbwd, json_of
from tests.gateway.saved import Clock
from tests.gateway.test_rest_checkpoints import sampler_of, url


def entries(running: Running, **query: Any) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = running.http.get("audit", params=query).raise_for_status().json()["entries"]
    return log


def test_the_audit_log_tells_what_became_of_a_checkpoint(running: Running, clock: Clock) -> None:
    run = running.make_run()
    path = saved.save(running, run, "a", "external_weights")
    body = {"source_path": path, "destination_project_id": "p"}
    calls: tuple[Callable[[], httpx.Response], ...] = (
        lambda: sampler_of(running, path),
        lambda: running.http.get(url(path, "/external_weights_urls")),
        lambda: running.http.post(url(path, "/publish")),
        lambda: running.http.post(url(path, "/publish")),
        lambda: running.http.delete(url(path, "/publish")),
        lambda: running.http.put(url(path, "/ttl"), json={"ttl_seconds": 7200}),
        lambda: running.http.post("copy_weights", json=body),
        lambda: running.http.delete(url(path)),
        lambda: running.http.delete(url(path)),
    )
    for call in calls:
        call().raise_for_status()
        clock.at += 1
    log = entries(running)
    assert [(entry["event"], entry["purpose"]) for entry in log] == [
        ("checkpoint_read", "sampling"), ("checkpoint_read", "download"), ("checkpoint_publish", None),
        ("checkpoint_unpublish", None), ("checkpoint_set_ttl", None), ("checkpoint_copy", None),
        ("checkpoint_delete", None),
    ]  # fmt: skip
    assert all((entry["tinker_path"], entry["model_id"]) == (path, run) for entry in log)
    assert log[4]["event_details"]["ttl_seconds"] == "7200"
    assert log[0]["timestamp"] == "2027-01-15T08:00:00+00:00"


def test_the_audit_log_is_by_day_and_kind(running: Running, clock: Clock) -> None:
    session = running.session()
    path = saved.save(running, running.make_run(session), "a")
    running.http.put(f"sessions/{session}/project", json={"project_id": "p"}).raise_for_status()
    clock.at += 24 * 3600
    running.http.delete(url(path)).raise_for_status()
    assert [entry["event"] for entry in entries(running)] == ["checkpoint_delete"]
    assert [entry["event"] for entry in entries(running, day="2027-01-15")] == ["project_session_assign"]
    assert entries(running, day="2027-01-15", event_type="checkpoints") == []
    assert len(entries(running, day="2027-01-15", event_type="projects")) == 1
    assert entries(running, event_type="teams") == entries(running, event_type="organizations") == []


@pytest.mark.parametrize("query", [{"day": "2027-02-30"}, {"day": "../.."}, {"event_type": "x"}])
def test_the_audit_log_has_days_and_kinds(running: Running, query: dict[str, str]) -> None:
    assert running.http.get("audit", params=query).status_code == 422


def test_what_is_refused_is_not_in_the_audit_log(running: Running) -> None:
    path = saved.save(running, saved.others_run(running), "a", tenant=saved.OTHER)
    assert running.http.delete(url(path)).status_code == 404
    assert entries(running) == []


# ---- usage

_DAY = {"starting_on": "2027-01-15T08:00:00Z", "ending_before": "2027-01-16T08:00:00Z"}


def usage(running: Running, **query: str) -> Any:
    return running.http.get("billing/usage/events", params=_DAY | query).raise_for_status().json()


def test_usage_counts_tokens_and_checkpoints_by_hour_and_run(running: Running, clock: Clock) -> None:
    session = running.session()
    running.http.put(f"sessions/{session}/project", json={"project_id": "p"}).raise_for_status()
    runs = [running.make_run(session, n) for n in range(2)]
    for run, seq, tokens in ((runs[0], 1, 3), (runs[0], 2, 4), (runs[1], 1, 50)):
        assert running.forward_backward(fwdbwd(run, seq, tokens)).status_code == 200
    clock.at += 3600
    running.forward_backward(fwdbwd(runs[0], 3, 5))
    saved.save(running, runs[0], "a", seq=4)
    rows = usage(running)
    nobody_trained = {"type": "training", "device_seconds": 0.0}
    assert [(row["bucket_start"][11:16], row["event_info"]) for row in rows["data"]] == [
        ("08:00", {**nobody_trained, "training_run_id": runs[1], "token_count": 50}),
        ("08:00", {**nobody_trained, "training_run_id": runs[0], "token_count": 7}),
        ("09:00", {**nobody_trained, "training_run_id": runs[0], "token_count": 5}),
        ("09:00", {"type": "checkpoint", "count": 1}),
    ]
    first = rows["data"][0]
    assert (first["base_model"], first["session_id"], first["project_id"]) == (MODEL.name, session, "p")
    assert list(rows["sessions"]) == [session]
    later = usage(running, starting_on="2027-01-15T09:00:00Z")
    assert [row["event_info"]["type"] for row in later["data"]] == ["training", "checkpoint"]
    assert usage(running, starting_on="2027-01-15T07:00:00Z", ending_before="2027-01-15T08:00:00Z")["data"] == []


@pytest.mark.parametrize("query", [
    {"starting_on": "2027-01-15T08:30:00Z"}, {"ending_before": "2027-01-15T08:00:00Z"},
    {"ending_before": "2027-01-29T09:00:00Z"}, {"starting_on": "yesterday"}, {"starting_on": "2027-01-15T08:00:00"},
    {"starting_on": "2027-01-15T09:00:00Z"},
])  # fmt: skip
def test_a_window_of_usage_has_bounds(running: Running, query: dict[str, str]) -> None:
    assert running.http.get("billing/usage/events", params=_DAY | query).status_code == 422


def test_the_longest_window_of_usage_is_served(running: Running) -> None:
    assert usage(running, ending_before="2027-01-29T08:00:00Z")["data"] == []


def test_too_much_usage_for_one_window_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running.make_run()
    for seq in (1, 2):
        running.forward_backward(fwdbwd(run, seq))
    monkeypatch.setattr(limits, "operations_listed_max", 2)
    assert len(usage(running)["data"]) == 1
    running.forward_backward(fwdbwd(run, 3))
    reply = running.http.get("billing/usage/events", params=_DAY)
    assert reply.status_code == 422
    assert "fewer hours" in reply.json()["detail"]


def test_what_a_deleted_run_used_is_told_for_good(running: Running) -> None:
    run = running.make_run()
    running.forward_backward(fwdbwd(run, 1, 5)).raise_for_status()
    results = [
        Result(seq=seq, sha256=b"", content_type="application/json", body=b"{}", failed=False) for seq in range(2)
    ]
    commit = Commit(epoch=1, results=results, committed_at=running.parts.clock(), device_s=0.5)
    assert running.run(running.store.put_if_absent(layout.commit(RunId(run), 1), encode(commit)))
    for deleted in (False, True):
        if deleted:
            assert running.http.delete(f"training_runs/{run}").status_code == 200
            assert running.run(running.store.get(layout.commit(RunId(run), 1))) is None, "its journal is gone"
        (row,) = usage(running)["data"]
        info = {"type": "training", "training_run_id": run, "token_count": 5, "device_seconds": 0.5}
        assert row["event_info"] == info
        assert row["session_id"] == run.partition(":")[0]


def test_storage_is_counted_by_project_and_shared_bytes_once(running: Running) -> None:
    sessions = [running.session(), running.session()]
    running.http.put(f"sessions/{sessions[1]}/project", json={"project_id": "p"}).raise_for_status()
    paths = [saved.save(running, running.make_run(session), "a") for session in sessions]
    saved.save(running, f"{sessions[1]}:train:0", "b", seq=2)
    running.post("copy_weights", {"source_path": paths[1], "session_id": sessions[1], "model_seq_id": 5})
    saved.save(running, saved.others_run(running), "theirs", tenant=saved.OTHER)

    def stored(**query: str) -> list[tuple[str | None, int, int]]:
        rows = running.http.get("billing/usage/checkpoints/current", params=query).raise_for_status().json()["data"]
        return [(row["project_id"], row["checkpoint_count"], row["size_bytes"]) for row in rows]

    assert stored() == [(None, 1, saved.SIZE), ("p", 3, 2 * saved.SIZE)]
    assert stored(project_id="p") == [("p", 3, 2 * saved.SIZE)]
    assert stored(project_id="q") == []


# ---- traces


def test_a_trace_is_a_link_to_the_sessions_operations(running: Running, clock: Clock) -> None:
    session = running.session()
    runs = [running.make_run(session, n) for n in range(2)]
    running.make_run()
    for seq in (1, 2):
        clock.at += 1
        running.forward_backward(fwdbwd(runs[1], seq))
    answer = running.http.get(f"sessions/{session}/trace_export").json()
    assert answer["status"] == "ready"
    with urllib.request.urlopen(answer["url"], timeout=10) as reply:
        trace = json_of(reply.read())
    named = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    begun = [event for event in trace["traceEvents"] if event["ph"] == "b"]
    assert named == dict(enumerate(runs))
    assert [(named[event["pid"]], event["name"], event["args"]["seq"]) for event in begun] == [
        (runs[1], "forward_backward", 1), (runs[1], "forward_backward", 2),
    ]  # fmt: skip
    assert [event["ts"] for event in begun] == [1_800_000_001_000_000, 1_800_000_002_000_000]
    assert trace["otherData"]["complete"]


def test_a_trace_that_leaves_something_out_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    session = running.session()
    runs = [running.make_run(session, n) for n in range(2)]
    for run, seq in ((runs[0], 1), (runs[0], 2), (runs[1], 1)):
        running.forward_backward(fwdbwd(run, seq))
    for most, complete in ((3, True), (2, False)):
        monkeypatch.setattr(limits, "operations_listed_max", most)
        link = running.http.get(f"sessions/{session}/trace_export").json()["url"]
        with urllib.request.urlopen(link, timeout=10) as reply:
            trace = json_of(reply.read())
        assert trace["otherData"] == {"operations": most, "complete": complete, "operations_max": most}
