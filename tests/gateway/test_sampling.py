"""Sampling sessions and sample futures, against an upstream that each test controls."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway import periodic_tasks
from knapper import limits
from knapper.wire import proto, sample_requests
from knapper.wire.types import SampledSequence, SampleOutput
from tests.gateway.running import MODEL, Running, gateway, serve

ANSWER = proto.encode_sample_response(
    SampleOutput(
        [SampledSequence(np.array([7, 8], dtype=np.int32), np.array([-0.5, -1.5], dtype=np.float32), stopped=False)]
    )
)


@dataclass
class Upstream:
    """Answers in turn what `replies` says, then a sample; holds requests while it is not `open`.

    It reads what the sample function reads, and as strictly.
    """

    replies: list[Response] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    open: bool = True
    cancelled: int = 0

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        sample_requests.decode(body, sample_requests.SampleCall).sample(request.headers["knapper-tenant"])
        self.calls.append(json.loads(body))
        while not self.open:
            await asyncio.sleep(0.01)
            if await request.is_disconnected():
                self.cancelled += 1
                return Response(status_code=499)
        return self.replies.pop(0) if self.replies else Response(ANSWER, media_type="application/x-protobuf")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Running, Upstream]]:
    upstream = Upstream()

    async def sample(request: Request) -> Response:
        return await upstream(request)

    with (
        serve(Starlette(routes=[Route("/", sample, methods=["POST"])])) as (url, _),
        gateway(sample_url=url) as running,
    ):
        yield running, upstream


@contextmanager
def fresh(served: tuple[Running, Upstream]) -> Iterator[Upstream]:
    """The upstream, for one test."""
    running, upstream = served
    upstream.replies, upstream.calls, upstream.open, upstream.cancelled = [], [], True, 0
    yield upstream
    upstream.open = True
    until(lambda: not running.parts.sample_queue.open)  # one still on its way would take a reply of the next test


@pytest.fixture
def upstream(served: tuple[Running, Upstream]) -> Iterator[Upstream]:
    with fresh(served) as upstream:
        yield upstream


@pytest.fixture
def running(served: tuple[Running, Upstream]) -> Running:
    return served[0]


def sampler(running: Running, session: str | None = None, n: int = 0) -> str:
    body = {"session_id": session or running.session(), "sampling_session_seq_id": n, "base_model": MODEL.name}
    return str(running.post("create_sampling_session", body)["sampling_session_id"])


def asample(session: str, seq: int = 1, **changes: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"type": "encoded_text", "tokens": [3]}]}
    body = {"sampling_session_id": session, "seq_id": seq, "prompt": prompt, "sampling_params": {}, "type": "sample"}
    return body | changes


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_sampling_session_is_made_once_and_can_be_looked_up(running: Running) -> None:
    session = running.session()
    first = sampler(running, session)
    assert first == f"{session}:sample:0"
    assert sampler(running, session) == first
    assert running.http.get(f"samplers/{first}").json() == {
        "sampler_id": first,
        "base_model": MODEL.name,
        "model_path": None,
    }
    assert sampler(running, session, 1) == f"{session}:sample:1"
    assert running.http.get(f"samplers/{session}:sample:9").status_code == 404
    body = {"session_id": session, "sampling_session_seq_id": 2}
    assert "base_model is None" in running.post("create_sampling_session", body, status=422)["detail"]
    missing = body | {"model_path": f"tinker://{session}:train:0/weights/x"}
    assert "does not exist" in running.post("create_sampling_session", missing, status=404)["detail"]
    unserved = running.post("create_sampling_session", body | {"base_model": "no/such"}, status=404)
    assert f"served: '{MODEL.name}'" in unserved["detail"]


def test_a_sample_is_promised_asked_for_and_kept(running: Running, upstream: Upstream) -> None:
    asked = asample(
        sampler(running), num_samples=2, sampling_params={"max_tokens": 5, "stop": []}, prompt_logprobs=True
    )
    promise = running.post("asample", asked)
    assert promise["request_id"].startswith("s-")
    assert len(set(promise["sample_sequence_ids"])) == 2
    assert running.post("asample", asked) == promise
    for _ in range(2):
        reply = running.http.post("retrieve_future", json={"request_id": promise["request_id"]})
        assert (reply.status_code, reply.content) == (200, ANSWER)
        assert reply.headers["content-type"] == "application/x-protobuf"
    assert len(upstream.calls) == 1
    call = upstream.calls[0]
    assert (call["base_model"], call["adapter"], call["prompt"]) == (MODEL.name, "", [1, 2, 3])
    assert (call["num_samples"], call["prompt_logprobs"], call["params"]["max_tokens"]) == (2, True, 5)
    assert call["params"]["ignore_eos"] is True


def test_the_gateway_chooses_a_seed_where_the_client_did_not(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    running.post("asample", asample(session, 1))
    running.post("asample", asample(session, 2))
    running.post("asample", asample(session, 3, sampling_params={"seed": 7}))
    until(lambda: len(upstream.calls) == 3)
    seeds = sorted(call["seed"] for call in upstream.calls)
    assert seeds[0] == 7
    assert seeds[1] != seeds[2]


def test_what_is_wrong_is_refused_by_name(running: Running, upstream: Upstream) -> None:
    session = sampler(running)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sampling_params": {"top_k": 0}}, "sampling_params.top_k is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"sampling_session_id": None}, "sampling_session_id"),
    ]
    for changes, complaint in wrong:
        assert complaint in running.post("asample", asample(session) | changes, status=422)["detail"]
    running.post("asample", asample(session[:-1] + "8"), status=404)
    assert upstream.calls == []


def test_an_error_of_the_user_comes_through_the_future(running: Running, upstream: Upstream) -> None:
    error = {"detail": "prompt has 9 tokens; allowed: 8", "code": "invalid_field", "category": "user"}
    upstream.replies.append(JSONResponse(error, status_code=422))
    promise = running.post("asample", asample(sampler(running)))
    failed = running.post("retrieve_future", {"request_id": promise["request_id"]})
    assert failed == {"error": "prompt has 9 tokens; allowed: 8", "category": "user"}


def test_not_now_is_tried_again(running: Running, upstream: Upstream) -> None:
    upstream.replies += [JSONResponse({}, status_code=503), Response("bad gateway", status_code=502)]
    promise = running.post("asample", asample(sampler(running)))
    assert running.http.post("retrieve_future", json={"request_id": promise["request_id"]}).content == ANSWER
    assert len(upstream.calls) == 3


def test_a_defect_that_comes_again_and_again_is_the_answer(running: Running, upstream: Upstream) -> None:
    upstream.replies += [Response("boom", status_code=500) for _ in range(3)]
    promise = running.post("asample", asample(sampler(running)))
    failed = running.post("retrieve_future", {"request_id": promise["request_id"]})
    assert failed["category"] == "server"
    assert len(upstream.calls) == 3


def test_a_cancelled_sample_ends_upstream(running: Running, upstream: Upstream) -> None:
    upstream.open = False
    promise = running.post("asample", asample(sampler(running)))
    until(lambda: upstream.calls)
    running.post("cancel_future", {"request_id": promise["request_id"]})
    until(lambda: upstream.cancelled == 1)
    running.post("retrieve_future", {"request_id": promise["request_id"]}, status=410)


def test_samples_end_with_their_session(running: Running, upstream: Upstream) -> None:
    upstream.open = False
    session, other = running.session(), running.session()
    mine = running.post("asample", asample(sampler(running, session)))
    theirs = running.post("asample", asample(sampler(running, other)))
    until(lambda: len(upstream.calls) == 2)
    running.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    until(lambda: upstream.cancelled == 1)
    upstream.open = True
    running.post("retrieve_future", {"request_id": mine["request_id"]}, status=410)
    assert running.http.post("retrieve_future", json={"request_id": theirs["request_id"]}).content == ANSWER


def test_samples_of_a_client_that_fell_silent_are_cancelled(
    running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.open = False
    session = running.session()
    promise = running.post("asample", asample(sampler(running, session)))
    until(lambda: upstream.calls)
    running.run(periodic_tasks.tick(running.parts))
    assert upstream.cancelled == 0
    monkeypatch.setattr(limits, "session_timeout_s", 0.0)
    time.sleep(0.01)
    running.run(periodic_tasks.tick(running.parts))
    until(lambda: upstream.cancelled == 1)
    running.post("retrieve_future", {"request_id": promise["request_id"]}, status=410)


def test_the_queue_has_a_limit(running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.open = False
    monkeypatch.setattr(limits, "samples_waiting_max", 3)
    session = sampler(running)
    promises = [running.post("asample", asample(session, seq)) for seq in range(3)]
    full = running.http.post("asample", json=asample(session, 3))
    assert (full.status_code, full.json()["code"]) == (429, "too_many")
    assert int(full.headers["Retry-After"]) >= 1
    assert running.post("asample", asample(session, 2)) == promises[2]
    upstream.open = True
    assert running.http.post("retrieve_future", json={"request_id": promises[0]["request_id"]}).status_code == 200
    until(lambda: running.http.post("asample", json=asample(session, 3)).status_code == 200)


def test_sessions_take_turns(running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.sample_queue._IN_FLIGHT_MAX", 1)
    upstream.open = False
    greedy, modest = sampler(running), sampler(running)
    order = {}
    for seq in range(4):
        order[running.post("asample", asample(greedy, seq, sampling_params={"seed": seq}))["request_id"]] = seq
    last = running.post("asample", asample(modest, 0, sampling_params={"seed": 100}))["request_id"]
    upstream.open = True
    for request_id in [*order, last]:
        assert running.http.post("retrieve_future", json={"request_id": request_id}).status_code == 200
    assert [call["seed"] for call in upstream.calls] == [0, 1, 100, 2, 3]


def test_results_that_nobody_fetches_are_forgotten(
    running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sampler(running)
    promise = running.post("asample", asample(session))
    assert running.http.post("retrieve_future", json={"request_id": promise["request_id"]}).status_code == 200
    monkeypatch.setattr("knapper.limits.sample_results_bytes_max", 4)
    running.run(periodic_tasks.tick(running.parts))
    running.post("retrieve_future", {"request_id": promise["request_id"]}, status=410)
    assert running.post("asample", asample(session))["request_id"] != promise["request_id"]


def test_an_answer_that_cannot_be_kept_is_refused_in_words(
    running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be forgotten before it is fetched, and the SDK would ask for it again, for ever."""
    session = sampler(running)
    tokens = np.arange(1000, dtype=np.int32)
    whole = proto.encode_sample_response(
        SampleOutput([SampledSequence(tokens, tokens.astype(np.float32), stopped=False)])
    )

    def asked(seq: int) -> httpx.Response:
        upstream.replies = [Response(whole, media_type="application/x-protobuf")]
        promise = running.post("asample", asample(session, seq))
        return running.http.post("retrieve_future", json={"request_id": promise["request_id"]})

    size = len(whole)
    monkeypatch.setattr("knapper.limits.sample_results_bytes_max", size)
    assert asked(1).content == whole, "the limit itself is allowed"
    monkeypatch.setattr("knapper.limits.sample_results_bytes_max", size - 1)
    told = asked(2).json()
    assert told["category"] == "user"
    assert told["error"].startswith(f"the answer has {size} bytes; allowed: {size - 1}. Ask for fewer samples")


def test_a_cold_start_is_told(running: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.futures._PAUSED_HOLD_S", 1.4)
    upstream.replies += [Response("no", status_code=503) for _ in range(6)]
    promise = running.post("asample", asample(sampler(running)))
    reply = running.post("retrieve_future", {"request_id": promise["request_id"]}, status=408)
    assert reply["queue_state"] == "paused_capacity"
    assert "sample does not answer yet (503: no)" in reply["queue_state_reason"]
    running.post("cancel_future", {"request_id": promise["request_id"]})
