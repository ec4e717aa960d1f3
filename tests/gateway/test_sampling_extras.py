"""One poll for all samples of a client, clones of a client, and samplers whose weights advance."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from knapper import limits
from knapper.state.sessions import Sampler, Samplers
from knapper.store.memory import MemoryStore
from tests.gateway.running import MODEL, Running, gateway, serve
from tests.gateway.test_sampling import ANSWER, Upstream, asample, fresh, sampler, until

CLONE = 10**9


@contextmanager
def started(store: MemoryStore | None = None, **settings: Any) -> Iterator[tuple[Running, Upstream]]:
    upstream = Upstream()

    async def sample(request: Request) -> Response:
        return await upstream(request)

    with serve(Starlette(routes=[Route("/", sample, methods=["POST"])])) as (url, _):
        with gateway(store, sample_url=url, **settings) as running:
            yield running, upstream
            upstream.open = True


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Running, Upstream]]:
    with started() as both:
        yield both


@pytest.fixture
def running(served: tuple[Running, Upstream]) -> Running:
    return served[0]


@pytest.fixture
def upstream(served: tuple[Running, Upstream]) -> Iterator[Upstream]:
    with fresh(served) as upstream:
        yield upstream


def poll(running: Running, session: str, cursor: int = 0, clone: int = 0, **more: Any) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": session, "cloned_sampler_id": clone}
    answer: dict[str, Any] = running.post("retrieve_futures", {"target": target, "prev_cursor": cursor} | more)
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    return [completion["request_id"] for completion in answer["completions"]]


def test_a_poll_tells_each_completion_once_in_order(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    assert poll(running, session, timeout=0) == {"completions": [], "cursor": 0}
    first = running.post("asample", asample(session, 1))["request_id"]
    seen = poll(running, session)
    finished = {"state": "finished", "request_id": first, "response_payload_uncompressed_size": len(ANSWER)}
    assert seen["completions"] == [finished]
    second = running.post("asample", asample(session, 2))["request_id"]
    then = poll(running, session, seen["cursor"])
    assert ids(then) == [second]
    assert then["cursor"] > seen["cursor"]
    assert poll(running, session, then["cursor"], timeout=0) == {"completions": [], "cursor": then["cursor"]}
    assert running.http.post("retrieve_future", json={"request_id": first}).content == ANSWER


def test_a_poll_whose_answer_was_lost_is_answered_again(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    running.post("asample", asample(session, 1))
    assert poll(running, session) == poll(running, session)


def test_a_poll_is_held_until_something_is_done(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    upstream.open = False
    promised = running.post("asample", asample(session, 1))["request_id"]
    opener = threading.Timer(0.3, lambda: setattr(upstream, "open", True))
    began = time.monotonic()
    opener.start()
    assert ids(poll(running, session)) == [promised]
    assert time.monotonic() - began >= 0.25


def test_a_poll_ends_empty_after_its_time(
    running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "poll_hold_s", 0.2)
    session = sampler(running)
    assert poll(running, session, 7) == {"completions": [], "cursor": 7}
    assert poll(running, session, 7, timeout=60.0)["completions"] == []


def test_failures_are_told_and_their_reason_is_fetched(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    upstream.replies = [JSONResponse({"detail": "no", "code": "invalid_field", "category": "user"}, 422)]
    promised = running.post("asample", asample(session, 1))["request_id"]
    assert poll(running, session)["completions"] == [{"state": "failed", "request_id": promised}]
    assert running.post("retrieve_future", {"request_id": promised}) == {"error": "no", "category": "user"}


def test_clones_see_their_own_samples_only(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    mine = running.post("asample", asample(session, CLONE - 1))["request_id"]
    theirs = running.post("asample", asample(session, 3 * CLONE))["request_id"]
    assert ids(poll(running, session)) == [mine]
    assert ids(poll(running, session, clone=3)) == [theirs]
    assert ids(poll(running, session, clone=2, timeout=0)) == []


def test_a_payload_that_was_fetched_for_good_is_let_go(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    promised = running.post("asample", asample(session, 1))["request_id"]
    cursor = poll(running, session)["cursor"]
    poll(running, session, cursor, timeout=0, retrieved_request_ids=[promised, "s-unknown"])
    running.post("retrieve_future", {"request_id": promised}, status=410)


def test_cursors_of_an_earlier_process_are_behind_those_of_a_later_one() -> None:
    store, now = MemoryStore(), [1_000_000.0]
    with started(store, clock=lambda: now[0]) as (running, _):
        session = sampler(running)
        running.post("asample", asample(session, 1))
        cursor = poll(running, session)["cursor"]
    now[0] += 1
    with started(store, clock=lambda: now[0]) as (running, _):
        promised = running.post("asample", asample(session, 2))["request_id"]
        assert ids(poll(running, session, cursor)) == [promised]


def test_polls_of_an_unknown_sampler_are_refused_and_leave_nothing_behind(running: Running, upstream: Upstream) -> None:
    target = {"sampling_session_id": "ses-" + "0" * 32 + ":sample:0"}
    running.post("retrieve_futures", {"target": target}, status=404)
    poll(running, sampler(running), clone=99, timeout=0)
    assert not running.parts.sample_queue._watchers


def test_each_clone_gets_a_number_of_its_own_also_after_a_restart() -> None:
    store = MemoryStore()
    with started(store) as (running, _):
        session = sampler(running)
        joined = [running.post("join_sampling_session", {"sampling_session_id": session}) for _ in range(3)]
        assert [each["client_counter"] for each in joined] == [1, 2, 3]
        other = sampler(running)
        assert running.post("join_sampling_session", {"sampling_session_id": other})["client_counter"] == 1
    with started(store) as (running, _):
        assert running.post("join_sampling_session", {"sampling_session_id": session})["client_counter"] == 4


def test_clones_have_a_limit(running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "clones_max", 2)
    session = sampler(running)
    for _ in range(2):
        running.post("join_sampling_session", {"sampling_session_id": session})
    refused = running.post("join_sampling_session", {"sampling_session_id": session}, status=422)
    assert "2 clones; allowed: no more" in refused["detail"]


def test_inflight_samplers_of_a_run_move_on_together_and_snapshots_stay(
    running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.lookups._INFLIGHT_FRESH_S", 0.0)
    session = running.session()

    def save(n: int, seq: int, kind: str, run: int = 0) -> str:
        made = Sampler(
            sampler=f"{session}:sample:{n}", tenant="local", base_model=MODEL.name, bundle=f"adapters/{run}-{seq}/",
            kind=kind, run=f"{session}:train:{run}", seq=seq,
        )  # fmt: skip
        for _ in range(2):  # a replay saves it again
            running.run(Samplers(running.store).create(made))
        return made.sampler

    def served_by(session: str, seq: int) -> str:
        before = len(upstream.calls)
        running.post("asample", asample(session, seq))
        until(lambda: len(upstream.calls) > before)
        return str(upstream.calls[-1]["adapter"])

    first, snapshot = save(0, 3, "inflight"), save(1, 3, "snapshot")
    assert served_by(first, 1) == "adapters/0-3/"
    second, _ = save(2, 11, "inflight"), save(3, 12, "inflight", run=1)
    assert [served_by(each, 2) for each in (first, second, snapshot)] == [
        "adapters/0-11/", "adapters/0-11/", "adapters/0-3/",
    ]  # fmt: skip


def test_a_new_inflight_sampler_never_uses_weights_older_than_its_own(
    running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago the newest was looked up."""
    monkeypatch.setattr("gateway.lookups._INFLIGHT_FRESH_S", 3600.0)
    session = running.session()
    adapters: list[str] = []
    for n, seq in enumerate((3, 11)):
        made = Sampler(
            sampler=f"{session}:sample:{n}", tenant="local", base_model=MODEL.name, bundle=f"adapters/{seq}/",
            kind="inflight", run=f"{session}:train:0", seq=seq,
        )  # fmt: skip
        running.run(Samplers(running.store).create(made))
        running.post("asample", asample(made.sampler, n))
        until(lambda: len(upstream.calls) == len(adapters) + 1)
        adapters.append(upstream.calls[-1]["adapter"])
    assert adapters == ["adapters/3/", "adapters/11/"]


def test_custom_losses_are_refused_with_what_to_do_instead(running: Running) -> None:
    body = {"session_id": running.session(), "custom_loss_seq_id": 0, "name": "mine", "inputs": [], "graph": {}}
    refused = running.post("create_custom_loss", body, status=422)
    assert "forward_backward_custom" in refused["detail"]
