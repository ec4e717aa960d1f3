"""Polls: held, woken, and asked to try again."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from knapper import limits
from knapper.errors import Corrupt
from knapper.ids import RunId
from knapper.serving import http
from knapper.state import layout
from knapper.state.journal.records import Commit, Result, encode
from tests.gateway.running import Running, fwdbwd, gateway, json_of, serve


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with gateway() as running:
        yield running


def result(seq: int, body: bytes = b'{"metrics":{}}', *, failed: bool = False) -> Result:
    return Result(seq=seq, sha256=b"", content_type="application/json", body=body, failed=failed)


def commit(running: Running, run: str, n: int, *results: Result) -> Commit:
    """As a train_step would have stored it."""
    record = Commit(epoch=1, results=list(results))
    assert running.run(running.store.put_if_absent(layout.commit(RunId(run), n), encode(record)))
    return record


def test_a_pending_poll_is_held_and_then_asked_to_come_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running.make_run()
    monkeypatch.setattr(limits, "poll_hold_s", 0.3)
    body = running.post("retrieve_future", {"request_id": f"{run}:0", "allow_metadata_only": True}, status=408)
    assert body["type"] == "try_again"
    assert body["request_id"] == f"{run}:0"
    assert body["queue_state"] == "active"


def test_a_cold_start_is_told_with_the_time_it_has_taken(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running.make_run()
    monkeypatch.setattr("gateway.futures._PAUSED_HOLD_S", 1.2)  # an unanswered doorbell is a cold start after 1 s
    body = running.post("retrieve_future", {"request_id": f"{run}:0"}, status=408)
    assert body["queue_state"] == "paused_capacity"
    assert body["queue_state_reason"].startswith("train_step is starting from zero: ")


def test_whoever_waits_on_a_damaged_run_hears_what_is_damaged_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: it is no cold start that might be over in a moment."""
    monkeypatch.setattr("gateway.train_client._COLD_S", 60.0)

    async def damaged(_: Request) -> Response:
        return http.error(Corrupt("object runs/x/out/7 is not a Commit record: truncated"))

    function = Starlette(routes=[Route("/", damaged, methods=["POST"])])
    with serve(function) as (url, _), gateway(train_step_url=f"{url}/") as running:
        run = running.make_run()
        reply = running.post("retrieve_future", {"request_id": f"{run}:0"}, status=408)
    assert reply["queue_state"] == "paused_capacity"
    assert "object runs/x/out/7 is not a Commit record" in reply["queue_state_reason"]
    assert f"{run} waits until it is restored from a backup; or go on from a checkpoint" in reply["queue_state_reason"]


def test_whoever_waits_on_a_damaged_answer_hears_it_and_the_answers_beside_it_are_told(running: Running) -> None:
    run = running.make_run()
    for seq in range(1, 4):
        running.forward_backward(fwdbwd(run, seq))
    for n, seq in enumerate(range(4), 1):
        commit(running, run, n, result(seq))
    name = layout.commit(RunId(run), 3)  # that of operation 2
    sound = running.run(running.store.get(name))
    damaged = sound[:40] + bytes([sound[40] ^ 4]) + sound[41:]
    running.run(put_instead(running, name, damaged))
    reply = running.post("retrieve_future", {"request_id": f"{run}:2"}, status=408)
    assert reply["queue_state"] == "paused_capacity"
    assert f"object {name} is damaged" in reply["queue_state_reason"]
    assert "operator" in reply["queue_state_reason"]
    for seq in (0, 1, 3):
        assert running.post("retrieve_future", {"request_id": f"{run}:{seq}"}) == {"metrics": {}}
    running.run(put_instead(running, name, sound))
    assert running.post("retrieve_future", {"request_id": f"{run}:2"}) == {"metrics": {}}, "it was restored"


async def put_instead(running: Running, name: str, data: bytes) -> None:
    await running.store.delete(name)
    await running.store.put_if_absent(name, data)


def test_a_run_whose_manifest_is_damaged_is_no_cold_start(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is rung for it: its holder is not known. Whoever waits hears why."""
    monkeypatch.setattr(limits, "poll_hold_s", 3.0)
    run = running.make_run()
    name = layout.manifest(RunId(run), 1)
    running.run(running.store.put_if_absent(name, b"damaged"))
    reply = running.post("retrieve_future", {"request_id": f"{run}:0"}, status=408)
    for _ in range(20):
        if "damaged" in (reply.get("queue_state_reason") or ""):
            break
        reply = running.post("retrieve_future", {"request_id": f"{run}:0"}, status=408)
    assert reply["queue_state"] == "paused_capacity"
    assert f"object {name} is damaged" in reply["queue_state_reason"]


def test_a_promise_of_a_store_that_was_put_back_to_an_older_backup_is_not_waited_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "poll_hold_s", 0.3)
    run = running.make_run()
    running.forward_backward(fwdbwd(run, 1))
    assert running.post("retrieve_future", {"request_id": f"{run}:1"}, status=408)["type"] == "try_again"
    running.run(running.store.delete(layout.operation(RunId(run), 1)))
    reply = running.post("retrieve_future", {"request_id": f"{run}:1"})
    assert reply["error"].startswith(f"operation 1 of {run} is not in the server's store")
    assert "create_training_client_from_state" in reply["error"]
    assert reply["category"] == "server"


def test_results_in_the_store_are_found_and_stay(running: Running) -> None:
    run = running.make_run()
    running.forward_backward(fwdbwd(run, 1))
    commit(running, run, 1)
    commit(running, run, 2, result(0, b'{"model_id":"m"}'), result(1))
    for _ in range(2):
        assert running.post("retrieve_future", {"request_id": f"{run}:1"}) == {"metrics": {}}
        assert running.post("retrieve_future", {"request_id": f"{run}:0"}) == {"model_id": "m"}


def test_a_failure_is_a_result_with_an_error(running: Running) -> None:
    run = running.make_run()
    commit(running, run, 1, result(0, b'{"error":"rank is wrong","category":"user"}', failed=True))
    assert running.post("retrieve_future", {"request_id": f"{run}:0"}) == {
        "error": "rank is wrong",
        "category": "user",
    }


def test_protobuf_results_keep_their_type(running: Running) -> None:
    run = running.make_run()
    made = Result(seq=0, sha256=b"", content_type="application/x-protobuf", body=b"\x0a\x00")
    commit(running, run, 1, made)
    reply = running.http.post("retrieve_future", json={"request_id": f"{run}:0"})
    assert reply.headers["content-type"] == "application/x-protobuf"
    assert reply.content == b"\x0a\x00"


def test_a_pushed_result_wakes_those_who_wait(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.futures._READ_EVERY_S", 30.0)  # no reads: only the stream can wake the poll
    run = running.make_run()
    with ThreadPoolExecutor() as pool:
        polls = [pool.submit(running.post, "retrieve_future", {"request_id": f"{run}:0"}) for _ in range(3)]
        time.sleep(0.5)
        assert not any(poll.done() for poll in polls)

        async def push() -> None:
            running.parts.results.offer(run, 1, Commit(epoch=1, results=[result(0)]))  # type: ignore[arg-type]
            running.parts.train_client.wake(run)  # type: ignore[arg-type]

        running.run(push())
        assert [poll.result(10) for poll in polls] == [{"metrics": {}}] * 3


def test_a_result_that_nobody_pushed_is_found_by_looking(running: Running) -> None:
    run = running.make_run()
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(running.post, "retrieve_future", {"request_id": f"{run}:0"})
        time.sleep(0.3)
        commit(running, run, 1, result(0))
        assert poll.result(10) == {"metrics": {}}


def test_a_new_gateway_over_the_same_store_answers_old_promises() -> None:
    with gateway() as before:
        run = before.make_run()
        commit(before, run, 1, result(0))
        store = before.store
    with gateway(store) as after:
        assert after.post("retrieve_future", {"request_id": f"{run}:0"}) == {"metrics": {}}
        assert after.forward_backward(fwdbwd(run, 1)).status_code == 200


def test_unknown_promises_are_told_apart(running: Running) -> None:
    assert running.post("retrieve_future", {"request_id": "s-0123"}, status=410)["code"] == "gone"
    never = "ses-" + "3" * 32 + ":train:0:1"
    assert running.post("retrieve_future", {"request_id": never}, status=404)["code"] == "not_found"
    assert running.post("retrieve_future", {"request_id": "nonsense"}, status=404)["code"] == "not_found"
    assert running.post("cancel_future", {"request_id": "s-0123"}) == {"status": "ok"}


def test_many_polls_share_one_look_at_the_store(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running.make_run()
    for seq in range(1, 40):
        running.forward_backward(fwdbwd(run, seq))
    reads: list[str] = []
    listed = running.store.list

    async def counting(prefix: str, start_after: str = "", limit: int = 0) -> list[str]:
        reads.append(prefix)
        return await listed(prefix, start_after, limit)

    monkeypatch.setattr(running.store, "list", counting)
    for hold in ("gateway.futures._PAUSED_HOLD_S", "knapper.limits.poll_hold_s"):
        monkeypatch.setattr(hold, 2.5)
    with ThreadPoolExecutor(40) as pool:
        replies = list(
            pool.map(lambda seq: running.http.post("retrieve_future", json={"request_id": f"{run}:{seq}"}), range(40))
        )
    assert {reply.status_code for reply in replies} == {408}
    assert sum(prefix == layout.commits(run) for prefix in reads) <= 12  # type: ignore[arg-type]
    assert json_of(replies[0].content)["type"] == "try_again"
