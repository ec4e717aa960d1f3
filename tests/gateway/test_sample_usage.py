"""Tokens of samples, from the response of the sample function to the usage report."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from knapper import limits
from knapper.errors import StoreError
from knapper.store.memory import MemoryStore
from knapper.wire import progress, proto
from knapper.wire.types import SampledSequence, SampleOutput
from tests.gateway.running import MODEL, Running, fwdbwd, gateway, serve
from tests.gateway.saved import Clock
from tests.gateway.test_sampling import asample, sampler

_HOURS = {"starting_on": "2027-01-15T08:00:00Z", "ending_before": "2027-01-15T10:00:00Z"}


def drawn(*lengths: int) -> bytes:
    return proto.encode_sample_response(
        SampleOutput([SampledSequence(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), False) for n in lengths])
    )


class Breaking(MemoryStore):
    """A store that can fail to write."""

    broken = False

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.broken:
            raise StoreError(f"cannot write {name}")
        return await super().put_if_absent(name, data)


@pytest.fixture
def upstream() -> Iterator[tuple[str, list[bytes]]]:
    """Where it is, and what it answers, in turn; after that 422."""
    replies: list[bytes] = []

    async def sample(_: Request) -> Response:
        if not replies:
            return Response(b'{"detail": "wrong", "category": "user"}', status_code=422)
        took = {"Knapper-Device-Seconds": "0.25"}
        return Response(replies.pop(0), media_type="application/x-protobuf", headers=took)

    with serve(Starlette(routes=[Route("/", sample, methods=["POST"])])) as (url, _):
        yield url, replies


@pytest.fixture
def store() -> Breaking:
    return Breaking()


@pytest.fixture
def running(upstream: tuple[str, list[bytes]], store: Breaking) -> Iterator[Running]:
    with gateway(store, sample_url=upstream[0], clock=Clock()) as running:
        yield running


def draw(running: Running, session: str, seq: int) -> None:
    """A prompt of three tokens, and wait for its sample."""
    request_id = running.post("asample", asample(session, seq))["request_id"]
    end = time.monotonic() + 10
    while running.http.post("retrieve_future", json={"request_id": request_id}).status_code == 408:
        assert time.monotonic() < end


def reported(running: Running) -> list[tuple[str, str | None, str, int]]:
    """(hour, session, what, tokens)"""
    running.run(running.parts.sample_usage.flush())
    usage = running.http.get("billing/usage/events", params=_HOURS).raise_for_status().json()
    assert set(usage["sessions"]) == {row["session_id"] for row in usage["data"] if row["session_id"]}
    assert all(row["base_model"] == MODEL.name and row["user_id"] == "local" for row in usage["data"])
    return [
        (row["bucket_start"][11:13], row["session_id"], row["event_info"]["type"], row["event_info"]["token_count"])
        for row in usage["data"]
    ]


def test_tokens_sampled_are_reported_by_hour_and_session(running: Running, upstream: tuple[str, list[bytes]]) -> None:
    clock: Any = running.parts.clock
    sessions = [running.session(), running.session()]
    samplers = [sampler(running, session) for session in sessions]
    upstream[1].extend([drawn(4, 5), drawn(2), drawn(50), drawn(7)])
    draw(running, samplers[0], 1)
    draw(running, samplers[0], 1)  # the same request: its first answer
    draw(running, samplers[0], 2)
    draw(running, samplers[1], 1)
    clock.at += 3600
    draw(running, samplers[0], 3)
    draw(running, samplers[0], 4)  # fails, and costs nothing
    assert reported(running) == [
        ("08", sessions[1], "sampling_sample", 50), ("08", sessions[0], "sampling_sample", 11),
        ("08", sessions[0], "sampling_prefill", 6), ("08", sessions[1], "sampling_prefill", 3),
        ("09", sessions[0], "sampling_sample", 7), ("09", sessions[0], "sampling_prefill", 3),
    ]  # fmt: skip


def test_seconds_of_the_device_are_reported_with_the_tokens_that_took_them(
    running: Running, upstream: tuple[str, list[bytes]]
) -> None:
    where = sampler(running)
    upstream[1].extend([drawn(5), drawn(2)])
    for seq in (1, 1, 2, 3):  # a repetition, and one that fails
        draw(running, where, seq)
    running.run(running.parts.sample_usage.flush())
    rows = running.http.get("billing/usage/events", params=_HOURS).raise_for_status().json()["data"]
    assert [row["event_info"] for row in rows] == [
        {"type": "sampling_sample", "token_count": 7, "device_seconds": 0.5},
        {"type": "sampling_prefill", "token_count": 6, "cached": False},
    ]


@pytest.mark.parametrize(("header", "seconds"), [
    (None, 0.0), ("0.125", 0.125), ("nan", 0.0), ("inf", 0.0), ("-1", 0.0), ("a while", 0.0),
])  # fmt: skip
def test_seconds_that_are_none_are_not_counted(header: str | None, seconds: float) -> None:
    assert progress.device_s(header) == seconds


def test_training_and_sampling_stand_in_one_report(running: Running, upstream: tuple[str, list[bytes]]) -> None:
    session = running.session()
    running.forward_backward(fwdbwd(running.make_run(session), 1, tokens=20)).raise_for_status()
    upstream[1].append(drawn(4))
    draw(running, sampler(running, session), 1)
    assert [row[1:] for row in reported(running)] == [
        (session, "training", 20), (session, "sampling_sample", 4), (session, "sampling_prefill", 3),
    ]  # fmt: skip


def test_what_a_store_would_not_take_is_written_later_and_once(
    running: Running, upstream: tuple[str, list[bytes]], store: Breaking
) -> None:
    session = running.session()
    upstream[1].extend([drawn(4), drawn(5)])
    where = sampler(running, session)
    draw(running, where, 1)
    store.broken = True
    with pytest.raises(StoreError):
        running.run(running.parts.sample_usage.flush())
    store.broken = False
    draw(running, where, 2)
    for _ in range(2):
        assert [row[2:] for row in reported(running)] == [("sampling_sample", 9), ("sampling_prefill", 6)]


def test_a_gateway_that_stops_writes_down_what_it_counted(upstream: tuple[str, list[bytes]], store: Breaking) -> None:
    upstream[1].append(drawn(4))
    with gateway(store, sample_url=upstream[0], clock=Clock()) as running:
        draw(running, sampler(running), 1)
    with gateway(store, clock=Clock()) as running:
        assert [row[2:] for row in reported(running)] == [("sampling_sample", 4), ("sampling_prefill", 3)]


def test_too_many_records_for_one_report_say_so(
    running: Running, upstream: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = sampler(running)
    monkeypatch.setattr(limits, "operations_listed_max", 1)
    replies = []
    for seq in (1, 2):
        upstream[1].append(drawn(1))
        draw(running, where, seq)
        running.run(running.parts.sample_usage.flush())
        replies.append(running.http.get("billing/usage/events", params=_HOURS))
    assert [reply.status_code for reply in replies] == [200, 422]
    assert "fewer hours" in replies[1].json()["detail"]
