"""A run's curve, operations and pauses are what its journal says; each record is read once."""

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from gateway.console.history import Histories
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.accept import pack
from knapper.state.journal.records import Commit, Kind, Manifest, Operation, Result, Terms, encode
from knapper.store import Store
from knapper.store.memory import MemoryStore
from knapper.wire import proto
from knapper.wire.types import Datum, ForwardBackward, ForwardBackwardOutput
from tests.gateway.finished import run_of
from tests.gateway.hours import CountingStore

RUN: RunId = run_of(1)
JSON, PROTOBUF = "application/json", "application/x-protobuf"


def _pass(seq: int, *, forward_only: bool = False) -> bytes:
    inputs: dict[str, Any] = {"target_tokens": np.array([1, 2], np.int64), "weights": np.ones(2, np.float32)}
    data = [Datum(tokens=np.array([1, 2], np.int32), inputs=inputs)]
    return proto.encode_forward_backward(ForwardBackward(RUN, seq, data, "cross_entropy", {}, forward_only))


def _sums(**sums: float) -> bytes:
    metrics = {f"{name}:sum": value for name, value in sums.items()}
    return proto.encode_forward_backward_output(ForwardBackwardOutput(outputs=[], metrics=metrics))


def _step(**metrics: float) -> bytes:
    return msgspec.json.encode({"metrics": metrics})


async def _put(
    store: Store, seq: int, kind: Kind, body: bytes, result: bytes, at: float, *, failed: bool = False, epoch: int = 1,
    device_s: float = 0.5, took_s: float = 2.0,
) -> None:  # fmt: skip
    packed = pack(body)
    operation = Operation(run=RUN, seq=seq, kind=kind, sha256=packed.sha256, body_zstd=packed.body_zstd, accepted_at=at)
    content = PROTOBUF if kind == "forward_backward" and not failed else JSON
    answer = Result(seq=seq, sha256=packed.sha256, content_type=content, body=result, failed=failed)  # type: ignore[arg-type]
    commit = Commit(epoch=epoch, results=[answer], committed_at=at + took_s, device_s=device_s)
    await store.put_if_absent(layout.operation(RUN, seq), encode(operation))
    await store.put_if_absent(layout.commit(RUN, seq), encode(commit))


def test_a_point_is_the_mean_over_the_passes_of_its_step() -> None:
    async def story() -> None:
        store = CountingStore(MemoryStore())
        await _put(store, 1, "forward_backward", _pass(1), _sums(loss=8.0, tokens=4.0, weights=4.0, kl=0.4), 100.0)
        await _put(store, 2, "forward_backward", _pass(2), _sums(loss=4.0, tokens=2.0, weights=2.0, kl=0.2), 101.0)
        await _put(
            store, 3, "forward_backward", _pass(3, forward_only=True), _sums(loss=900.0, tokens=9.0, weights=9.0), 102.0
        )
        failure = msgspec.json.encode({"error": "rank is 0", "category": "user"})
        await _put(store, 4, "forward_backward", _pass(4), failure, 103.0, failed=True, device_s=0.0)
        values = _step(grad_norm=3.0, learning_rate=0.01, optimizer_steps=7.0)
        await _put(store, 5, "optim_step", b"{}", values, 104.0)
        histories = Histories(store)
        history = await histories.of(RUN)
        (point,) = history.points
        assert point == pytest.approx({
            "step": 7.0, "at": 106.0, "loss/mean": 2.0, "kl/mean": 0.1, "tokens": 6.0, "grad_norm": 3.0,
            "learning_rate": 0.01, "tokens/second": 6.0 / 2.0,
        })  # fmt: skip
        assert [(done.seq, done.failed, done.error) for done in history.newest()][:2] == [
            (5, False, ""), (4, True, "rank is 0"),
        ]  # fmt: skip
        store.calls.clear()
        assert (await histories.of(RUN)).points == history.points
        assert store.verbs == {"list": 1}, "what was read is kept"
        await _put(store, 6, "optim_step", b"{}", _step(grad_norm=1.0, optimizer_steps=8.0), 110.0)
        store.calls.clear()
        assert [point["step"] for point in (await histories.of(RUN)).points] == [7.0, 8.0]
        assert store.verbs == {"list": 1, "get": 2}

    asyncio.run(story())


def test_a_pause_has_its_stages() -> None:
    """The second process claimed the run 20 s after the operation came, and answered 5 s later."""

    async def story() -> None:
        store = MemoryStore()
        terms = Terms(device="cpu", dtype="float32", threads=1, versions="")
        for n, (epoch, at) in enumerate(((1, 99.5), (1, 99.5), (2, 220.0)), 1):
            manifest = Manifest(epoch=epoch, holder=f"h{epoch}", address="", claimed_at=at, terms=terms)
            await store.put_if_absent(layout.manifest(RUN, n), encode(manifest))
        await _put(store, 1, "optim_step", b"{}", _step(optimizer_steps=1.0), 99.6)
        await _put(store, 2, "optim_step", b"{}", _step(optimizer_steps=2.0), 200.0, epoch=2, took_s=25.0)
        histories = Histories(store)
        history, manifests = await histories.of(RUN), await histories.manifests(RUN)
        pauses = history.pauses({each.epoch: each.claimed_at for each in manifests})
        assert [(pause.seq, [round(seconds, 6) for _, seconds in pause.stages]) for pause in pauses] == [
            (2, [20.0, 5.0]), (1, [0.0, 2.0]),
        ]  # fmt: skip

    asyncio.run(story())


def test_concurrent_readers_count_nothing_twice() -> None:
    async def story() -> None:
        store = MemoryStore()
        for seq in range(1, 40):
            kind: Kind = "optim_step" if seq % 2 == 0 else "forward_backward"
            body, result = (b"{}", _step(optimizer_steps=seq / 2)) if seq % 2 == 0 else (
                _pass(seq), _sums(loss=1.0, tokens=1.0, weights=1.0)
            )  # fmt: skip
            await _put(store, seq, kind, body, result, float(seq))
        histories = Histories(store)
        await asyncio.gather(*(histories.of(RUN) for _ in range(8)))
        history = await histories.of(RUN)
        assert [point["step"] for point in history.points] == [float(n) for n in range(1, 20)]
        assert {point["loss/mean"] for point in history.points} == {1.0}

    asyncio.run(story())
