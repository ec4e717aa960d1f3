"""Checkpoints over raw HTTP: lists, deletion, publishing, times to live, and the bytes behind them."""

from typing import Any

import httpx
import pytest

from gateway import periodic_tasks
from knapper import limits
from tests.gateway import saved
from tests.gateway.running import MODEL, Running, settings
from tests.gateway.saved import Clock


def url(path: str, ending: str = "") -> str:
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"training_runs/{run}/checkpoints/{kind}/{name}{ending}"


def paths(running: Running, where: str = "checkpoints") -> list[str]:
    return [
        checkpoint["tinker_path"] for checkpoint in running.http.get(where).raise_for_status().json()["checkpoints"]
    ]


def loads(running: Running, path: str) -> int:
    """The status of an attempt to load it into a new run."""
    body = {"session_id": running.session(), "model_seq_id": 0, "path": path, "optimizer": False}
    return running.http.post("load_weights", json=body).status_code


def sampler_of(running: Running, path: str, session: str | None = None, n: int = 0) -> httpx.Response:
    body = {"session_id": session or running.session(), "sampling_session_seq_id": n, "model_path": path}
    return running.http.post("create_sampling_session", json=body)


def test_a_list_is_newest_first_and_pages_with_a_cursor(running: Running, clock: Clock) -> None:
    runs = [running.make_run(), running.make_run()]
    made = []
    for n in range(5):
        made.append(saved.save(running, runs[n % 2], f"step-{n}", seq=n + 1))
        clock.at += 1
    assert paths(running) == made[::-1]
    pages = [running.http.get("checkpoints", params={"limit": 2, "offset": at}).json() for at in (0, 2, 4)]
    assert [checkpoint["tinker_path"] for page in pages for checkpoint in page["checkpoints"]] == made[::-1]
    assert [page["cursor"] for page in pages] == [
        {"offset": at, "limit": 2, "total_count": 5} for at in (0, 2, 4)
    ]  # fmt: skip


def found(running: Running, **query: Any) -> list[str]:
    return [each["tinker_path"] for each in running.post("checkpoints/search", query)["checkpoints"]]


def test_a_search_pages_through_everything_once(running: Running, clock: Clock) -> None:
    run = running.make_run()
    early = saved.save(running, run, "early", seq=9)
    clock.at += 0.000001
    later = [saved.save(running, run, f"b-{n}", seq=n + 1) for n in range(4)]  # at the same moment
    seen, cursor = [], None
    for _ in range(3):
        page = running.post("checkpoints/search", {"limit": 2} | ({"cursor": cursor} if cursor else {}))
        seen += [each["tinker_path"] for each in page["checkpoints"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert seen == [*sorted(later, reverse=True), early]


def test_a_search_filters(running: Running) -> None:
    run = running.make_run()
    a = saved.save(running, run, "a", "weights", seq=1)
    b = saved.save(running, run, "b", "sampler_weights", seq=2)
    saved.save(running, saved.others_run(running), "theirs", tenant=saved.OTHER, public=True)
    assert set(found(running)) == {a, b}
    assert found(running, checkpoint_type="sampler") == [b]
    assert found(running, user_metadata={"note": "a"}) == [a]
    assert found(running, user_metadata={"note": "a", "more": "x"}) == []
    assert set(found(running, base_models=[MODEL.name, "another"])) == {a, b}
    assert found(running, base_models=[]) == found(running, base_models=["another"]) == []
    assert set(found(running, owner={"type": "user", "owner_urns": ["local"]})) == {a, b}
    assert found(running, owner={"type": "user", "owner_urns": [saved.OTHER]}) == []
    assert found(running, project_ids=["p"]) == []
    session = run.partition(":")[0]
    running.http.put(f"sessions/{session}/project", json={"project_id": "p"}).raise_for_status()
    assert set(found(running, project_ids=["p", "q"])) == {a, b}
    assert all(each["base_model"] == MODEL.name for each in running.post("checkpoints/search", {})["checkpoints"])
    wrong: dict[str, Any]
    for wrong in ({"limit": 201}, {"limit": 0}, {"checkpoint_type": "weights"}, {"name": "a"}, {"cursor": {}}):
        assert running.http.post("checkpoints/search", json=wrong).status_code == 422
    assert running.http.post("checkpoints/search", json={"limit": 200}).status_code == 200


def test_a_list_of_one_run_shows_each_kind(running: Running) -> None:
    run = running.make_run()
    saved.save(running, run, "a", "weights", seq=1)
    saved.save(running, run, "a", "sampler_weights", seq=2)
    saved.save(running, run, "a", "external_weights", seq=3)
    saved.save(running, running.make_run(), "elsewhere")
    checkpoints = running.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"]
    assert {each["checkpoint_id"]: each["checkpoint_type"] for each in checkpoints} == {
        "weights/a": "training", "sampler_weights/a": "sampler", "external_weights/a": "external",
    }  # fmt: skip
    assert all(each["size_bytes"] == saved.SIZE and each["user_metadata"] == {"note": "a"} for each in checkpoints)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("limit", limits.page_max + 1), ("offset", -1), ("x", 1)])
def test_a_page_has_bounds(running: Running, name: str, value: int) -> None:
    reply = running.http.get("checkpoints", params={name: value})
    assert reply.status_code == 422
    assert name in reply.json()["detail"]


def test_the_largest_page_is_served(running: Running) -> None:
    assert running.http.get("checkpoints", params={"limit": limits.page_max}).status_code == 200


def test_a_deleted_checkpoint_is_gone_for_new_clients(running: Running) -> None:
    run = running.make_run()
    path = saved.save(running, run, "a")
    assert loads(running, path) == 200
    assert sampler_of(running, path).status_code == 200
    assert running.http.delete(url(path)).status_code == 200
    assert paths(running) == paths(running, f"training_runs/{run}/checkpoints") == []
    assert loads(running, path) == 404
    assert sampler_of(running, path).status_code == 404
    assert running.http.post("weights_info", json={"tinker_path": path}).status_code == 404
    assert running.http.delete(url(path)).status_code == 200, "the first reply may have been lost"


def test_a_deleted_name_may_be_used_again(running: Running) -> None:
    run = running.make_run()
    path = saved.save(running, run, "a", seq=1)
    running.http.delete(url(path)).raise_for_status()
    assert saved.save(running, run, "a", seq=2) == path
    assert paths(running) == [path]


def test_publishing_twice_is_no_conflict_and_shows(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    for _ in range(2):
        assert running.http.post(url(path, "/publish")).status_code == 200
        assert running.http.get("checkpoints").json()["checkpoints"][0]["public"]
    for _ in range(2):
        assert running.http.delete(url(path, "/publish")).status_code == 200
        assert not running.http.get("checkpoints").json()["checkpoints"][0]["public"]


def test_another_tenants_checkpoint_answers_as_a_missing_one_unless_it_is_public(running: Running) -> None:
    run = saved.others_run(running)
    private = saved.save(running, run, "private", tenant=saved.OTHER)
    public = saved.save(running, run, "public", tenant=saved.OTHER, public=True, seq=2)
    missing = f"tinker://{run}/weights/missing"
    assert [loads(running, path) for path in (private, missing, public)] == [404, 404, 200]
    assert [sampler_of(running, path).status_code for path in (private, missing, public)] == [404, 404, 200]
    assert paths(running) == []
    for path in (private, public):
        changes = [
            running.http.delete(url(path)),
            running.http.post(url(path, "/publish")),
            running.http.delete(url(path, "/publish")),
            running.http.put(url(path, "/ttl"), json={"ttl_seconds": None}),
        ]
        for change, same in zip(changes, [running.http.delete(url(missing))] * 4, strict=True):
            assert change.status_code == same.status_code == 404
            assert change.json()["detail"].replace(path, missing) == same.json()["detail"]
    for gone in (f"training_runs/{run}", f"training_runs/{run}/checkpoints"):
        assert running.http.get(gone).status_code == 404


def test_an_expired_checkpoint_answers_as_a_missing_one(running: Running, clock: Clock) -> None:
    run = running.make_run()
    path = saved.save(running, run, "a")
    running.http.put(url(path, "/ttl"), json={"ttl_seconds": 3600}).raise_for_status()
    clock.at += 3599
    assert loads(running, path) == 200
    clock.at += 1
    assert loads(running, path) == 404
    assert paths(running) == []
    assert running.http.put(url(path, "/ttl"), json={"ttl_seconds": None}).status_code == 404
    assert saved.save(running, run, "a", seq=2) == path, "its name is free"


def test_a_time_to_live_can_be_taken_away(running: Running, clock: Clock) -> None:
    path = saved.save(running, running.make_run(), "a", ttl_s=3600)
    assert running.http.get("checkpoints").json()["checkpoints"][0]["expires_at"] == "2027-01-15T09:00:00+00:00"
    running.http.put(url(path, "/ttl"), json={"ttl_seconds": None}).raise_for_status()
    assert running.http.get("checkpoints").json()["checkpoints"][0]["expires_at"] is None
    clock.at += 1e9
    assert paths(running) == [path]


@pytest.mark.parametrize(("ttl_s", "status"), [
    (limits.ttl_s_min, 200), (limits.ttl_s_min - 1, 422), (limits.ttl_s_max, 200), (limits.ttl_s_max + 1, 422),
])  # fmt: skip
def test_a_time_to_live_has_bounds(running: Running, ttl_s: int, status: int) -> None:
    path = saved.save(running, running.make_run(), "a")
    assert running.http.put(url(path, "/ttl"), json={"ttl_seconds": ttl_s}).status_code == status


def test_a_time_to_live_must_be_said(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    assert running.http.put(url(path, "/ttl"), json={}).status_code == 422


def test_a_name_that_leaves_its_folder_is_refused(running: Running) -> None:
    run = running.make_run()
    for name in ("%2e%2e", "..%2fx", "a%20b", "%00"):
        assert running.http.delete(f"training_runs/{run}/checkpoints/weights/{name}").status_code in (404, 422), name
    assert running.http.delete(f"training_runs/{run}/checkpoints/secrets/a").status_code == 422


# ---- the bytes


GRACE_S, UNASKED_S = settings().keep_orphans_s, settings().keep_samplers_s


def sweep(running: Running) -> list[str]:
    """One run of the gateway's collector task; returns the bundles that it deleted."""
    before = bundles_of(running)
    running.run(periodic_tasks.collect(running.parts))
    return sorted(before - bundles_of(running))


def gone_within(running: Running, clock: Clock, seconds: float) -> int:
    """How many bundles the periodic task deletes in that time and two more runs."""
    pace_s = running.parts.collector.pace_s
    gone = 0
    for _ in range(int(seconds / pace_s) + 2):
        clock.at += pace_s
        gone += len(sweep(running))
    return gone


def bundles_of(running: Running) -> set[str]:
    return {name.rpartition("/")[0] for name in saved.bundle_names(running)}


def test_bytes_go_an_hour_after_the_last_name_that_led_to_them(running: Running, clock: Clock) -> None:
    run = running.make_run()
    remaining = saved.save(running, run, "kept", seq=1)
    gone = saved.save(running, run, "gone", seq=2, ttl_s=3600)
    running.http.delete(url(saved.save(running, run, "deleted", seq=3))).raise_for_status()
    before = saved.bundle_names(running)
    assert sweep(running) == []
    clock.at += GRACE_S - 1
    assert sweep(running) == []
    assert saved.bundle_names(running) == before
    clock.at += running.parts.collector.pace_s
    assert len(sweep(running)) == 1, "the deleted one; the expired one is only just found"
    clock.at += GRACE_S
    assert len(sweep(running)) == 1
    left = {name.rpartition("/")[0] for name in saved.bundle_names(running)}
    assert len(left) == 1
    assert [loads(running, remaining), loads(running, gone)] == [200, 404]


def test_a_save_under_way_keeps_its_bytes(running: Running, clock: Clock) -> None:
    """Its files lie there before its name does."""
    run = running.make_run()
    path = saved.save(running, run, "a", seq=1)
    [name] = running.run(running.store.list("checkpoints/"))
    record = running.run(running.store.get(name))
    running.run(running.store.delete(name))
    assert sweep(running) == []
    clock.at += GRACE_S - 1
    assert running.run(running.store.put_if_absent(name, record))
    clock.at += GRACE_S
    assert sweep(running) == []
    assert loads(running, path) == 200


def test_a_sampler_keeps_the_bytes_of_a_deleted_checkpoint_while_its_session_lives(
    running: Running, clock: Clock
) -> None:
    path = saved.save(running, running.make_run(), "a")
    session = running.session()
    sampler = sampler_of(running, path, session).json()["sampling_session_id"]
    running.http.delete(url(path)).raise_for_status()
    for _ in range(8):  # days
        clock.at += 24 * 3600
        running.post("session_heartbeat", {"session_id": session})
        assert sweep(running) == []
    assert running.http.get(f"samplers/{sampler}").json()["model_path"] == path
    assert len(saved.bundle_names(running)) == len(saved.FILES) + 1
    running.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    assert sweep(running) == []
    clock.at += UNASKED_S
    assert sweep(running) == [], "the sampler is gone, and its files wait for loads under way"
    assert running.http.get(f"samplers/{sampler}").status_code == 404
    assert gone_within(running, clock, GRACE_S) == 1
    assert saved.bundle_names(running) == []


def test_a_session_that_nobody_hears_of_keeps_nothing_after_a_week(running: Running, clock: Clock) -> None:
    path = saved.save(running, running.make_run(), "a")
    sampler_of(running, path).raise_for_status()
    running.http.delete(url(path)).raise_for_status()
    clock.at += limits.session_expiry_s
    assert sweep(running) == []
    clock.at += GRACE_S
    assert sweep(running) == [], "silent for a week only now"
    clock.at += UNASKED_S
    assert sweep(running) == []
    assert gone_within(running, clock, GRACE_S) == 1
