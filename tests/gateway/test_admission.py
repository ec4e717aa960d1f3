"""Quotas of tenants, where work is accepted: what is refused, in which words, until when, and who is not touched.

The gateways are real servers over one store. What a quota counts comes from the store, so no test tells it a number.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import periodic_tasks
from knapper import limits
from knapper.ids import Tenant
from knapper.state.api_keys import Keys
from knapper.state.journal.records import Operation
from knapper.state.quotas import QuotaBook, Values
from knapper.store import Store
from knapper.store.directory import DirectoryStore
from knapper.store.memory import MemoryStore
from tests.gateway import saved
from tests.gateway.hours import CountingStore
from tests.gateway.openai.chatting import chat_model
from tests.gateway.running import MODEL, Running, create_model, fwdbwd, gateway, serve
from tests.gateway.saved import Clock
from tests.gateway.test_rest_checkpoints import url
from tests.gateway.test_sampling import Upstream, asample, sampler, until

HOUR_S = 3600.0
TO_MIDNIGHT_S = 16 * HOUR_S  # from the time at which the clock begins, 08:00 UTC


@contextmanager
def sampled(clock: Clock, store: Store | None = None, **changes: Any) -> Iterator[tuple[Running, Upstream]]:
    """A gateway, and what it sends samples to."""
    upstream = Upstream()

    async def sample(request: Request) -> Response:
        return await upstream(request)

    with (
        serve(Starlette(routes=[Route("/", sample, methods=["POST"])])) as (url, _),
        gateway(store, clock=clock, monotonic=clock, sample_url=url, **changes) as running,
    ):
        yield running, upstream
        upstream.open = True


def allow(running: Running, tenant: str = "local", **values: int | None) -> None:
    """In force at once: as if the gateway had last looked at quotas five seconds ago."""
    given: Values = dict(values)
    running.run(QuotaBook(running.store, lambda: 0.0).change(lambda newest: newest.changed(tenant, given)))
    running.run(running.parts.admission._readers.quotas.newest())


def used(running: Running, field: str = "tokens_a_day") -> int:
    number: int = running.http.get("quota").raise_for_status().json()[field]["used"]
    return number


# ---- tokens of a day


def test_a_day_has_so_many_tokens_and_the_next_one_as_many_again(running: Running, clock: Clock) -> None:
    run = running.make_run()
    allow(running, tokens_a_day=10)
    for seq in (1, 2, 3):
        assert running.forward_backward(fwdbwd(run, seq)).status_code == 200
    refused = running.forward_backward(fwdbwd(run, 4))
    assert refused.status_code == 402
    assert refused.json() == {
        "detail": "tenant local has used 9 tokens today, and asks for up to 3 more; allowed: 10 a day. The next day "
        "begins at 00:00 UTC, in 16:00:00. Its operator sets quotas with `knapper quota set`",
        "code": "quota_used_up",
        "category": "user",
    }
    assert refused.headers["retry-after"] == str(int(TO_MIDNIGHT_S) + 1)
    assert running.stored(run, 4) is None
    step = {"model_id": run, "seq_id": 4, "adam_params": {"learning_rate": 1e-4}, "type": "optim_step"}
    running.post("optim_step", step)  # it has no tokens: a step that was begun can be ended, and saved
    clock.at += TO_MIDNIGHT_S - 1
    assert running.forward_backward(fwdbwd(run, 5)).status_code == 402
    clock.at += 1
    assert used(running) == 0
    for seq in (5, 6, 7):
        assert running.forward_backward(fwdbwd(run, seq)).status_code == 200
    assert running.forward_backward(fwdbwd(run, 8)).status_code == 402


def test_a_repetition_is_answered_over_the_quota_and_counts_once(running: Running, clock: Clock) -> None:
    run = running.make_run()
    allow(running, tokens_a_day=6)
    answers = [running.forward_backward(fwdbwd(run, seq)) for seq in (1, 2, 1, 2, 1)]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert answers[0].json() == answers[2].json() == answers[4].json()
    assert used(running) == 6
    clock.at += 60  # what is recorded is read again
    assert running.forward_backward(fwdbwd(run, 2)).status_code == 200
    assert running.forward_backward(fwdbwd(run, 3)).status_code == 402
    assert used(running) == 6


def test_what_was_used_is_known_to_a_gateway_that_has_just_started(tmp_path: Path, clock: Clock) -> None:
    store = DirectoryStore(tmp_path)
    with gateway(store, clock=clock, monotonic=clock) as running:
        allow(running, tokens_a_day=10)
        run = running.make_run()
        for seq in (1, 2, 3):
            assert running.forward_backward(fwdbwd(run, seq)).status_code == 200
    with gateway(DirectoryStore(tmp_path), model=None, clock=clock, monotonic=clock) as running:
        assert running.forward_backward(fwdbwd(run, 4)).status_code == 402
        assert running.forward_backward(fwdbwd(run, 3)).status_code == 200
        assert used(running) == 9


def test_a_request_that_no_day_has_room_for_fails_in_its_future_and_leaves_no_gap(running: Running) -> None:
    run = running.make_run()
    allow(running, tokens_a_day=10)
    assert running.forward_backward(fwdbwd(run, 1, tokens=11)).status_code == 200
    stored = running.stored(run, 1)
    assert isinstance(stored, Operation)
    assert stored.kind == "tombstone"
    assert stored.error.startswith(
        "the request has up to 11 tokens; allowed: 10, which tenant local may use in a whole"
    )
    assert running.forward_backward(fwdbwd(run, 2)).status_code == 200


def test_another_tenant_is_not_touched(clock: Clock) -> None:
    with gateway(clock=clock, monotonic=clock, keys=True) as running:
        keys = Keys(running.store, clock)
        secrets = iter(f"{n:064x}" for n in range(2))
        for tenant in ("alice", "bob"):
            key = running.run(keys.create(Tenant(tenant), "", secrets.__next__))[0]
            running.http.headers["X-API-Key"] = key
            run = running.make_run()
            if tenant == "alice":
                allow(running, "alice", tokens_a_day=3, runs=1)
            answers = [running.forward_backward(fwdbwd(run, seq)).status_code for seq in (1, 2, 3)]
            created = running.http.post("create_model", json=create_model(running.session())).status_code
            assert (answers, created) == (([200, 402, 402], 429) if tenant == "alice" else ([200] * 3, 200))


def test_a_default_is_for_all_tenants_without_a_value_of_their_own(running: Running) -> None:
    run = running.make_run()
    allow(running, "", tokens_a_day=2)
    allow(running, "somebody-else", tokens_a_day=1000)
    assert running.forward_backward(fwdbwd(run, 1, tokens=2)).status_code == 200
    assert running.forward_backward(fwdbwd(run, 2, tokens=1)).status_code == 402
    allow(running, tokens_a_day=None)
    assert running.forward_backward(fwdbwd(run, 2, tokens=100)).status_code == 200


def test_an_operation_that_waits_for_its_quota_is_not_given_up(running: Running, clock: Clock) -> None:
    """The SDK sends chunks 2, 3, ... before chunk 1, and chunk 1 may be the one that is refused."""
    run = running.make_run()
    allow(running, tokens_a_day=3)
    assert running.forward_backward(fwdbwd(run, 2)).status_code == 200
    assert running.forward_backward(fwdbwd(run, 1)).status_code == 402
    for _ in range(15):
        clock.at += HOUR_S
        running.run(periodic_tasks.revive(running.parts, run))  # type: ignore[arg-type]  # a run's id
        assert running.stored(run, 1) is None
    clock.at += HOUR_S - 30
    running.run(periodic_tasks.revive(running.parts, run))  # type: ignore[arg-type]
    clock.at += 60
    running.run(periodic_tasks.revive(running.parts, run))  # type: ignore[arg-type]
    assert running.stored(run, 1) is None, "its client has not had the time to send it again"
    assert running.forward_backward(fwdbwd(run, 1)).status_code == 200
    assert isinstance(stored := running.stored(run, 1), Operation)
    assert stored.kind == "forward_backward"


def test_without_a_quota_an_operation_that_never_comes_is_given_up(running: Running, clock: Clock) -> None:
    run = running.make_run()
    assert running.forward_backward(fwdbwd(run, 2)).status_code == 200
    clock.at += limits.sequence_gap_s
    running.run(periodic_tasks.revive(running.parts, run))  # type: ignore[arg-type]
    assert isinstance(stored := running.stored(run, 1), Operation)
    assert stored.kind == "tombstone"


AT_ONCE = 8


def pour(running: Running, run: str, count: int) -> int:
    """Tokens that were accepted, of so many operations at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(
            pool.map(lambda seq: running.forward_backward(fwdbwd(run, seq)).status_code, range(1, count + 1))
        )
    assert set(answers) <= {200, 402}
    return 3 * answers.count(200)


def test_two_gateways_do_not_each_hand_out_the_whole_quota(tmp_path: Path, clock: Clock) -> None:
    with (
        gateway(DirectoryStore(tmp_path), clock=clock, monotonic=clock) as a,
        gateway(DirectoryStore(tmp_path), model=None, clock=clock, monotonic=clock) as b,
    ):
        allow(a, tokens_a_day=300)
        runs = a.make_run(), b.make_run()
        with ThreadPoolExecutor(2) as pool:
            accepted = sum(pool.map(pour, (a, b), runs, (100, 100)))
        unrecorded = 3 * AT_ONCE  # of operations that one was accepting as the other looked
        assert 294 <= accepted <= 450 + unrecorded, "the quota, and half of what one had left when the other came"
        clock.at += 60
        assert used(a) == used(b) == accepted
        for running, run in zip((a, b), runs, strict=True):
            assert running.forward_backward(fwdbwd(run, 101)).status_code == 402


# ---- samples


def test_so_many_samples_are_in_flight_and_more_when_some_are_done(clock: Clock) -> None:
    with sampled(clock) as (running, upstream):
        allow(running, samples_in_flight=4)
        upstream.open = False
        session = sampler(running)
        first = running.post("asample", asample(session, 1, num_samples=3))
        running.post("asample", asample(session, 2))
        refused = running.http.post("asample", json=asample(session, 3))
        assert refused.status_code == 429
        assert refused.json()["code"] == "quota_reached"
        assert refused.json()["detail"].startswith(
            "tenant local has 4 samples in flight, and asks for 1 more; allowed: 4. Send it again when some are done"
        )
        assert refused.headers["retry-after"] == "1"
        assert running.post("asample", asample(session, 1, num_samples=3)) == first, "a repetition is answered"
        impossible = running.http.post("asample", json=asample(session, 4, num_samples=5))
        assert (impossible.status_code, impossible.json()["code"]) == (422, "invalid_field")
        assert used(running, "samples_in_flight") == 4
        upstream.open = True
        until(lambda: not running.parts.sample_queue.open)
        running.post("asample", asample(session, 3))


def test_a_sample_holds_what_it_may_use_and_gives_the_rest_back(clock: Clock) -> None:
    """The prompt has 3 tokens, and each answer 2 of the 7 that it may have."""
    with sampled(clock) as (running, upstream):
        allow(running, tokens_a_day=20)
        upstream.open = False
        session, few = sampler(running), {"max_tokens": 7}
        running.post("asample", asample(session, 1, sampling_params=few))
        running.post("asample", asample(session, 2, sampling_params=few))
        refused = running.http.post("asample", json=asample(session, 3, sampling_params=few))
        assert (refused.status_code, refused.headers["retry-after"]) == (402, "5")
        assert "has used 0 tokens today, and samples in flight may use 20 more" in refused.json()["detail"]
        upstream.open = True
        until(lambda: not running.parts.sample_queue.open)
        assert used(running) == 10
        running.post("asample", asample(session, 3, sampling_params=few))
        until(lambda: not running.parts.sample_queue.open)
        assert running.http.post("asample", json=asample(session, 4, sampling_params=few)).status_code == 402
        clock.at += 60
        assert used(running) == 15, "from the records, as from memory"
        whole = running.http.post("asample", json=asample(session, 5, num_samples=10, sampling_params=few))
        assert (whole.status_code, whole.json()["code"]) == (413, "too_large")


def test_two_gateways_see_each_others_samples(tmp_path: Path, clock: Clock) -> None:
    with (
        sampled(clock, DirectoryStore(tmp_path)) as (a, upstream),
        sampled(clock, DirectoryStore(tmp_path), model=None) as (b, _),
    ):
        allow(a, samples_in_flight=8)
        session = sampler(a)
        upstream.open = False
        for seq in range(8):
            a.post("asample", asample(session, seq))
        clock.at += 11
        a.run(a.parts.admission.renew())
        assert b.http.post("asample", json=asample(session, 8)).status_code == 429
        upstream.open = True
        until(lambda: not a.parts.sample_queue.open)
        clock.at += 11
        a.run(a.parts.admission.renew())
        clock.at += 60
        a.run(a.parts.admission.renew())
        b.post("asample", asample(session, 8))
        until(lambda: not b.parts.sample_queue.open)
        clock.at += 120
        for each in (a, b):
            each.run(each.parts.admission.renew())
        assert a.run(a.store.list("held/")) == [], "who asks for nothing leaves nothing"


def test_openai_clients_get_their_own_words(clock: Clock, tmp_path: Path) -> None:
    model = msgspec.structs.replace(MODEL, directory=str(chat_model(tmp_path / "model")))
    with sampled(clock, model=model) as (running, upstream):
        allow(running, samples_in_flight=2, tokens_a_day=20)
        body = {"model": MODEL.name, "prompt": [1, 2, 3], "max_tokens": 5}
        v1 = httpx.Client(base_url=f"{running.url}/v1/", headers={"Authorization": "Bearer tml-local"}, timeout=30)
        with v1:
            upstream.open = False
            with ThreadPoolExecutor(1) as pool:
                two = pool.submit(v1.post, "completions", json=body | {"n": 2})
                until(lambda: running.parts.sample_queue.open)
                busy = v1.post("completions", json=body)
                upstream.open = True
                two.result()
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
            assert busy.json()["error"]["code"] == "rate_limit_exceeded"
            assert busy.json()["error"]["type"] == "requests"
            empty = v1.post("completions", json=body | {"max_tokens": 17})
            assert empty.status_code == 429
            assert empty.headers["retry-after"] == str(int(TO_MIDNIGHT_S) + 1)
            assert empty.headers["x-should-retry"] == "false"
            error = empty.json()["error"]
            assert (error["code"], error["type"]) == ("insufficient_quota", "insufficient_quota")
            assert error["message"].startswith("tenant local has used")


# ---- runs, ranks and bytes


def test_so_many_runs_are_open_and_more_when_a_session_has_finished(running: Running, clock: Clock) -> None:
    allow(running, runs=2)
    session = running.session()
    first = running.make_run(session, 0)
    running.make_run(session, 1)
    refused = running.http.post("create_model", json=create_model(session, 2))
    assert refused.status_code == 429
    assert refused.headers["x-should-retry"] == "false", "the SDK raises at once: time alone frees nothing"
    assert refused.json()["detail"].startswith(
        "tenant local has 2 open training runs; allowed: 2. Close a ServiceClient whose runs are done (close()), or"
    )
    assert running.make_run(session, 0) == first, "a repetition is answered"
    assert used(running, "runs") == 2
    other = running.session()
    running.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    running.make_run(other)
    assert used(running, "runs") == 1
    clock.at += 3 * 24 * HOUR_S
    assert used(running, "runs") == 0, "its client was not heard of for days"


def test_runs_that_are_made_at_the_same_moment_do_not_exceed_the_quota(running: Running) -> None:
    allow(running, runs=3)
    session = running.session()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(
            pool.map(lambda n: running.http.post("create_model", json=create_model(session, n)).status_code, range(8))
        )
    assert answers.count(200) <= 3
    assert set(answers) <= {200, 429}
    for n in range(8):
        running.http.post("create_model", json=create_model(session, n))
    assert used(running, "runs") == 3


def test_a_rank_above_the_quota_is_an_invalid_field(running: Running) -> None:
    allow(running, rank=8)
    body = create_model(running.session(), lora_config={"rank": 9})
    refused = running.http.post("create_model", json=body)
    assert refused.status_code == 422
    assert refused.json()["detail"] == "rank is 9; allowed: 1 to 8: the quota of tenant local"
    running.post("create_model", body | {"lora_config": {"rank": 8}})


def test_checkpoints_have_so_many_bytes_and_more_when_one_is_deleted(running: Running, clock: Clock) -> None:
    run = running.make_run()
    paths = [saved.save(running, run, name, seq=seq) for seq, name in enumerate("ab", 1)]
    allow(running, bytes=2 * saved.SIZE)
    save = {"model_id": run, "seq_id": 1, "path": "c", "type": "save_weights"}
    refused = running.http.post("save_weights", json=save)
    assert (refused.status_code, refused.json()["code"]) == (402, "quota_used_up")
    assert refused.json()["detail"].startswith("the checkpoints of tenant local have 1.4 KiB; allowed: 1.4 KiB. Delete")
    unnamed = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 1, "type": "save_weights_for_sampler"}
    running.post("save_weights_for_sampler", unnamed)  # no checkpoint: these are deleted when newer ones come
    assert used(running, "bytes") == 2 * saved.SIZE
    running.http.delete(url(paths[0])).raise_for_status()
    clock.at += 11
    running.post("save_weights", save | {"seq_id": 2})


# ---- what it costs


def test_a_tenant_without_a_quota_costs_one_read_in_five_seconds(clock: Clock) -> None:
    store = CountingStore(MemoryStore())
    with gateway(store, clock=clock, monotonic=clock) as running:
        run = running.make_run()
        for seq in range(1, 21):
            running.forward_backward(fwdbwd(run, seq))
        reads = {call: count for call, count in store.calls.items() if call[1] in ("quotas", "held", "usage")}
        assert reads == {("list", "quotas"): 1, ("get", "quotas"): 1}
        clock.at += 5
        for seq in range(21, 41):
            running.forward_backward(fwdbwd(run, seq))
        assert store.calls["get", "quotas"] == 2


def test_a_tenant_with_a_quota_is_looked_at_twice_a_minute(clock: Clock) -> None:
    store = CountingStore(MemoryStore())
    with gateway(store, clock=clock, monotonic=clock) as running:
        run = running.make_run()
        allow(running, tokens_a_day=10**6)
        running.forward_backward(fwdbwd(run, 1))
        store.calls.clear()
        for seq in range(2, 102):
            running.forward_backward(fwdbwd(run, seq))
            clock.at += 0.6
        assert store.calls["list", "usage"] <= 3, "what is recorded, each half a minute"
        assert 1 <= store.calls["list", "held"] <= 8, "what others show, every ten seconds"
