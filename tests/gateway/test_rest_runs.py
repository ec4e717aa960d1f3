"""Training runs and sessions over raw HTTP."""

from typing import Any

import pytest

from gateway import periodic_tasks
from knapper.ids import LOCAL_TENANT, CheckpointKind, RunId
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.layout import run_prefix
from tests.gateway import saved
from tests.gateway.running import MODEL, Running, create_model, fwdbwd, settings
from tests.gateway.saved import Clock


def get(running: Running, path: str, **query: Any) -> Any:
    return running.http.get(path, params=query).raise_for_status().json()


def run_ids(running: Running, **query: Any) -> list[str]:
    return [run["training_run_id"] for run in get(running, "training_runs", **query)["training_runs"]]


def make_session(running: Running, clock: Clock, **more: Any) -> str:
    body = {"tags": [], "sdk_version": "0.38.0", "type": "create_session"} | more
    made: str = running.post("create_session", body)["session_id"]
    clock.at += 1
    return made


# ---- runs


def test_runs_are_listed_newest_first_in_pages(running: Running, clock: Clock) -> None:
    made = []
    for _ in range(2):
        session = make_session(running, clock)
        made += [running.make_run(session, n) for n in (0, 1, 10)]
    saved.others_run(running)
    assert run_ids(running) == made[::-1]
    assert run_ids(running, limit=4) + run_ids(running, limit=4, offset=4) == made[::-1]
    assert get(running, "training_runs", limit=4, offset=4)["cursor"] == {"offset": 4, "limit": 4, "total_count": 6}


def test_a_run_made_twice_is_listed_once(running: Running) -> None:
    session = running.session()
    for _ in range(3):
        running.post("create_model", create_model(session))
    assert run_ids(running) == [f"{session}:train:0"]


def test_a_run_that_was_registered_and_never_made_is_not_shown(running: Running, clock: Clock) -> None:
    session = make_session(running, clock)
    record = running.run(running.parts.lookups.session(session, LOCAL_TENANT))
    running.run(running.parts.tenant_index.add_run(record, RunId(f"{session}:train:0")))
    assert run_ids(running) == []
    assert running.http.get(f"training_runs/{session}:train:0").status_code == 404


def test_a_run_tells_of_itself(running: Running, clock: Clock) -> None:
    session = make_session(running, clock)
    settings = create_model(session, user_metadata={"task": "sums", "n": 3})
    run = running.post("create_model", settings)["model_id"]
    clock.at += 60
    assert running.forward_backward(fwdbwd(run, 1)).status_code == 200
    saved.save(running, run, "old", seq=2)
    clock.at += 1
    kinds: tuple[CheckpointKind, ...] = ("weights", "sampler_weights")
    for kind in kinds:
        saved.save(running, run, "new", kind, seq=3)
    record = get(running, f"training_runs/{run}", access_scope="accessible")
    assert record["last_checkpoint"].pop("tinker_path") == f"tinker://{run}/weights/new"
    assert record["last_sampler_checkpoint"].pop("tinker_path") == f"tinker://{run}/sampler_weights/new"
    del record["last_checkpoint"], record["last_sampler_checkpoint"]
    assert record == {
        "training_run_id": run, "base_model": MODEL.name, "model_owner": "local", "is_lora": True, "lora_rank": 4,
        "last_request_time": "2027-01-15T08:01:01+00:00", "user_metadata": {"task": "sums", "n": "3"}, "alarms": 0,
    }  # fmt: skip
    assert get(running, "training_runs")["training_runs"][0]["training_run_id"] == run


def test_runs_of_a_project(running: Running, clock: Clock) -> None:
    first = make_session(running, clock, project_id="p")
    second = make_session(running, clock)
    runs = [running.make_run(first), running.make_run(second)]
    assert run_ids(running, project_id="p") == [runs[0]]
    put = running.http.put(f"sessions/{second}/project", json={"project_id": "p"})
    assert put.status_code == 200
    assert run_ids(running, project_id="p") == runs[::-1]
    running.http.put(f"sessions/{first}/project", json={"project_id": "q"}).raise_for_status()
    assert run_ids(running, project_id="p") == [runs[1]]


def test_a_deleted_run_is_gone_with_all_that_is_of_it_and_its_owner_is_told(running: Running) -> None:
    session = running.session()
    run, other = running.make_run(session), running.make_run(session, 1)
    path = saved.save(running, run, "a")
    remaining = saved.save(running, other, "a")
    running.forward_backward(fwdbwd(run, 1)).raise_for_status()
    for _ in range(2):  # a repetition is silent: the first reply may have been lost
        assert running.http.delete(f"training_runs/{run}").raise_for_status().json() == {"status": "ok"}
    assert run_ids(running) == [other]
    assert [checkpoint["tinker_path"] for checkpoint in get(running, "checkpoints")["checkpoints"]] == [remaining]
    assert {name.split("/")[1] for name in saved.bundle_names(running)} == {other}
    left = running.run(running.store.list(run_prefix(RunId(run))))
    assert {name.split("/")[2] for name in left} == {"end", "out"}
    replies = [
        running.http.get(f"training_runs/{run}"),
        running.forward_backward(fwdbwd(run, 2)),
        running.http.post("optim_step", json={"model_id": run, "seq_id": 2, "adam_params": {}, "type": "optim_step"}),
        running.http.post("retrieve_future", json={"request_id": f"{run}:1", "allow_metadata_only": True}),
        running.http.post("get_info", json={"model_id": run, "type": "get_info"}),
        running.http.post("create_model", json=create_model(session)),
    ]
    for reply in replies:
        assert reply.status_code == 404, reply.text
        assert f"training run {run} was deleted on" in reply.json()["detail"]
    missing = running.http.post("load_weights", json=_load(running.session(), path))
    assert missing.status_code == 404
    assert running.http.post("load_weights", json=_load(running.session(), remaining)).status_code == 200
    entries = get(running, "audit")["entries"]
    assert [entry["model_id"] for entry in entries if entry["event"] == "training_run_delete"] == [run]


def _load(session: str, path: str) -> dict[str, Any]:
    return {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}


def test_only_its_tenant_deletes_a_run_and_all_others_find_none(running: Running) -> None:
    theirs, path = saved.others_run(running), f"training_runs/{saved.others_run(running)}"
    saved.save(running, theirs, "a", tenant=saved.OTHER)
    before = running.run(running.store.list(""))
    answers = [running.http.delete(path), running.http.delete(f"training_runs/ses-{'0' * 32}:train:0")]
    assert [reply.status_code for reply in answers] == [404, 404]
    assert answers[0].json()["detail"] == answers[1].json()["detail"].replace(f"ses-{'0' * 32}:train:0", theirs)
    assert running.run(running.store.list("")) == before
    running.run(running.parts.collector.delete(RunId(theirs), saved.OTHER))  # by themselves
    again = running.http.delete(path)
    assert (again.status_code, again.json()["detail"]) == (404, answers[0].json()["detail"])


def test_a_copy_of_a_deleted_run_s_checkpoint_lives_on(running: Running) -> None:
    run = running.make_run()
    path = saved.save(running, run, "a")
    copy = running.post("copy_weights", {"source_path": path, "destination_project_id": "p"})["tinker_path"]
    running.http.delete(f"training_runs/{run}").raise_for_status()
    assert len(saved.bundle_names(running)) == len(saved.FILES) + 1
    assert running.http.post("load_weights", json=_load(running.session(), copy)).status_code == 200
    running.http.delete(f"training_runs/{copy.removeprefix('tinker://').partition('/')[0]}").raise_for_status()
    running.run(periodic_tasks.collect(running.parts))
    assert saved.bundle_names(running) == []


def test_a_poll_hears_that_its_run_was_deleted_behind_the_gateway_s_back(running: Running) -> None:
    """By the operator, in another process: the gateway learns it from train_step, which finds no such run."""
    run = running.make_run()
    running.forward_backward(fwdbwd(run, 1)).raise_for_status()
    collector = Collector(running.store, Retention.of(settings()), running.parts.clock, running.parts.clock)
    running.run(collector.delete(RunId(run), "local"))
    running.parts.lookups.forget_run(RunId(run))  # as the reply to a doorbell does
    reply = running.http.post("retrieve_future", json={"request_id": f"{run}:1", "allow_metadata_only": True})
    assert (reply.status_code, "was deleted on" in reply.text) == (404, True)


# ---- sessions


def test_sessions_are_listed_newest_first_in_pages(running: Running, clock: Clock) -> None:
    made = [make_session(running, clock) for _ in range(3)]
    saved.others_run(running)
    assert get(running, "sessions")["sessions"] == made[::-1]
    assert get(running, "sessions", limit=1, offset=1)["sessions"] == [made[1]]


def test_a_session_tells_of_its_runs_and_samplers(running: Running, clock: Clock) -> None:
    session = make_session(running, clock, display_name="nightly", user_metadata={"a": "b"})
    runs = [running.make_run(session, n) for n in (0, 2)]
    for n in (1, 10):
        body = {"session_id": session, "sampling_session_seq_id": n, "base_model": MODEL.name}
        running.post("create_sampling_session", body)
    make_session(running, clock)
    assert get(running, f"sessions/{session}") == {
        "training_run_ids": runs, "sampler_ids": [f"{session}:sample:1", f"{session}:sample:10"],
        "user_metadata": {"a": "b"}, "display_name": "nightly",
    }  # fmt: skip


def test_another_tenants_session_answers_as_a_missing_one(running: Running) -> None:
    theirs = saved.others_run(running).partition(":")[0]
    missing = "ses-" + "0" * 32
    for session in (theirs, missing):
        replies = [
            running.http.get(f"sessions/{session}"),
            running.http.get(f"sessions/{session}/trace_export"),
            running.http.put(f"sessions/{session}/project", json={"project_id": "p"}),
        ]
        assert [reply.status_code for reply in replies] == [404] * 3
        assert {reply.json()["detail"].replace(session, "X") for reply in replies} == {
            "session 'X' does not exist; create one with create_session (the SDK does so by itself)"
        }


def search(running: Running, **query: Any) -> list[str]:
    return [entry["session_id"] for entry in running.post("sessions/search", query)["sessions"]]


def test_search_pages_through_everything_once(running: Running, clock: Clock) -> None:
    made = [make_session(running, clock) for _ in range(2)]
    for _ in range(3):  # at the same moment
        made.append(make_session(running, clock))
        clock.at -= 1
    seen, cursor = [], None
    for _ in range(3):
        page = running.post("sessions/search", {"limit": 2} | ({"cursor": cursor} if cursor else {}))
        seen += [entry["session_id"] for entry in page["sessions"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert seen == [*sorted(made[2:], reverse=True), made[1], made[0]]


def test_search_filters(running: Running, clock: Clock) -> None:
    a = make_session(running, clock, display_name="Nightly RL run", user_metadata={"k": "v", "n": "1"})
    b = make_session(running, clock, display_name="nightly sft", project_id="p")
    c = make_session(running, clock)
    running.post(f"sessions/{a}/finish", {"reason": {"type": "errored"}, "detail": "out of luck"})
    assert search(running, display_name="NIGHTLY") == [b, a]
    assert search(running, display_name="run nightly") == [a]
    assert search(running, session_id=c, display_name="sft") == [c, b]
    assert search(running, session_id=c) == [c]
    assert search(running, user_metadata={"k": "v"}) == [a]
    assert search(running, user_metadata={"k": "v", "n": "2"}) == []
    assert search(running, project_ids=["p"]) == [b]
    assert search(running, owner={"type": "user", "owner_urns": ["nobody"]}) == []
    assert search(running, owner={"type": "accessible"}) == [c, b, a]
    assert search(running, statuses=[{"type": "active"}]) == [c, b]
    assert search(running, statuses=[{"type": "client_finished"}]) == [a]
    assert search(running, statuses=[{"type": "client_finished", "reasons": ["success"]}]) == []
    assert search(running, statuses=[{"type": "failed"}, {"type": "cancelled"}]) == []


def test_search_summarises(running: Running, clock: Clock) -> None:
    session = make_session(running, clock, display_name="x", user_metadata={"k": "v"}, project_id="p")
    run = running.make_run(session)
    for n in (1, 2):
        saved.save(running, run, f"c{n}", seq=n)
    running.post(f"sessions/{session}/finish", {"reason": {"type": "interrupted"}, "detail": "Ctrl-C"})
    assert running.post("sessions/search", {})["sessions"] == [{
        "session_id": session, "created_at": "2027-01-15T08:00:00+00:00", "owner": "local", "project_id": "p",
        "status": {"type": "client_finished", "reason": {"type": "interrupted"}, "detail": "Ctrl-C"},
        "display_name": "x", "user_metadata": {"k": "v"}, "checkpoints_count": 2,
        "checkpoint_storage_bytes": 2 * saved.SIZE,
    }]  # fmt: skip


@pytest.mark.parametrize("asked", [{"limit": 0}, {"limit": 201}, {"statuses": []}, {"display_name": ""}, {"x": 1}])
def test_a_search_has_bounds(running: Running, asked: dict[str, Any]) -> None:
    assert running.http.post("sessions/search", json=asked).status_code == 422
    assert running.http.post("sessions/search", json={"limit": 200}).status_code == 200
