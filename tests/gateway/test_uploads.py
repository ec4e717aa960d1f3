"""Uploads that are pulled: a Pub/Sub server of our own, built from Google's own protocol definitions (constructed: the
real service was not asked), and a bucket of the emulator that nobody tells of.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.pubsub_v1.types import (
    AcknowledgeRequest,
    PubsubMessage,
    PullRequest,
    PullResponse,
    ReceivedMessage,
)  # fmt: skip

from knapper.events import cloudevents
from knapper.exchange import Exchange
from knapper.exchange.gcs import GcsExchange
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state import dead_letters
from knapper.store.memory import MemoryStore
from tests.gateway.running import Running, gateway
from tests.gateway.test_jobs import FILES, DoorbellLog
from tests.store.emulator import Emulator, gcs

__all__ = ["gcs"]

SUBSCRIPTION = "projects/p/subscriptions/uploads"
BUCKET_KEYS = {"eventType": "OBJECT_FINALIZE", "payloadFormat": "JSON_API_V1"}


class Topic:
    """Delivers each message again until it is acknowledged, as Pub/Sub does, and refuses what that refuses."""

    def __init__(self) -> None:
        self.messages: dict[str, PubsubMessage] = {}
        self.deliveries: dict[str, int] = {}
        self._acks: dict[str, str] = {}  # of every delivery its own
        self._lock = threading.Lock()

    def publish(self, id_: str, attributes: dict[str, str], data: bytes = b"") -> None:
        assert attributes or data, "a message has data or attributes"
        with self._lock:
            self.messages[id_] = PubsubMessage(message_id=id_, attributes=attributes, data=data)

    def pull(self, request: PullRequest, context: grpc.ServicerContext) -> PullResponse:
        self._expect(request.subscription, context)
        if request.max_messages < 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "max_messages must be greater than 0")
        time.sleep(0.02)
        with self._lock:
            messages = []
            for id_, message in list(self.messages.items())[: request.max_messages]:
                self.deliveries[id_] = self.deliveries.get(id_, 0) + 1
                ack = f"ack {id_} {self.deliveries[id_]}"
                self._acks[ack] = id_
                messages.append(ReceivedMessage(ack_id=ack, message=message))
        return PullResponse(received_messages=messages)

    def acknowledge(self, request: AcknowledgeRequest, context: grpc.ServicerContext) -> Empty:
        self._expect(request.subscription, context)
        if not request.ack_ids:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no ack ids specified")
        with self._lock:
            for ack in request.ack_ids:
                if ack not in self._acks:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"invalid ack id {ack}")
                self.messages.pop(self._acks[ack], None)
        return Empty()

    @staticmethod
    def _expect(subscription: str, context: grpc.ServicerContext) -> None:
        """Also where the request is routed to, which the client says beside it."""
        if subscription != SUBSCRIPTION:
            context.abort(grpc.StatusCode.NOT_FOUND, f"resource not found (resource={subscription})")
        routing = dict(context.invocation_metadata()).get("x-goog-request-params")
        if routing != f"subscription={SUBSCRIPTION}":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"routed by {routing!r}")


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Topic]:
    topic = Topic()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    methods: dict[str, Any] = {
        "Pull": grpc.unary_unary_rpc_method_handler(topic.pull, PullRequest.deserialize, PullResponse.serialize),
        "Acknowledge": grpc.unary_unary_rpc_method_handler(
            topic.acknowledge, AcknowledgeRequest.deserialize, Empty.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("google.pubsub.v1.Subscriber", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{port}")
    yield topic
    server.stop(None).wait()


@pytest.fixture
def exchange(gcs: Emulator, monkeypatch: pytest.MonkeyPatch) -> GcsExchange:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    return GcsExchange(gcs.make_bucket(), "team/")


@pytest.fixture
def doorbells() -> DoorbellLog:
    return DoorbellLog()


def job_services(exchange: Exchange, store: MemoryStore, doorbells: DoorbellLog) -> JobServices:
    return JobServices(store, exchange, Notifier(doorbells.post, time.time), time.time)


def upload(running: Running, exchange: Exchange, name: str, text: str) -> dict[str, str]:
    """Put it there; what its notification says."""
    running.run(exchange.publish(f"inbox/local/j/{name}", text.encode()))
    blob = running.run(exchange.read(f"inbox/local/j/{name}", 1000))
    attributes = {
        "bucketId": exchange.bucket,
        "objectId": f"team/inbox/local/j/{name}",
        "objectGeneration": blob.generation,
    }
    return {**BUCKET_KEYS, **attributes}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_notifications_start_a_job_once_and_are_acknowledged(
    topic: Topic, exchange: GcsExchange, doorbells: DoorbellLog
) -> None:
    store = MemoryStore()
    with gateway(store, job_services=job_services(exchange, store, doorbells), subscription=SUBSCRIPTION) as running:
        first = upload(running, exchange, "job.yaml", FILES["job.yaml"])
        topic.publish("1", first, json.dumps({"bucket": exchange.bucket, "name": first["objectId"], "size": "9",
                                              "generation": first["objectGeneration"]}).encode())  # fmt: skip
        until(lambda: not topic.messages)
        assert doorbells.events == []
        second = upload(running, exchange, "d.jsonl", FILES["d.jsonl"])
        topic.publish("2", second)
        topic.publish("3", second)
        topic.publish("4", {**second, "eventType": "OBJECT_DELETE"})
        until(lambda: not topic.messages)
        assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]


def test_a_message_that_no_bucket_sends_becomes_a_dead_letter(
    topic: Topic, exchange: GcsExchange, doorbells: DoorbellLog
) -> None:
    store = MemoryStore()
    with gateway(store, job_services=job_services(exchange, store, doorbells), subscription=SUBSCRIPTION) as running:
        topic.publish("9", {"hello": "world"}, b"\xff")
        topic.publish("8", {**BUCKET_KEYS, "bucketId": "others", "objectId": "inbox/a/b/c", "objectGeneration": "1"})
        until(lambda: not topic.messages)
        letters = {letter.attributes["id"]: letter for letter in running.run(dead_letters.listed(store))}
        assert set(letters) == {"8", "9"}
        assert letters["9"].body == b"\xff"
        assert "bucketId" in letters["9"].attributes["knativeerrordata"]


def test_an_odd_name_keeps_none_of_those_that_came_with_it(
    topic: Topic, exchange: GcsExchange, doorbells: DoorbellLog
) -> None:
    store = MemoryStore()
    with gateway(store, job_services=job_services(exchange, store, doorbells), subscription=SUBSCRIPTION) as running:
        attributes = {**BUCKET_KEYS, "bucketId": exchange.bucket, "objectGeneration": "1"}
        for n, name in enumerate(
            ["x", "", "team/", "team/inbox", "team/x", "\u202e", "a\nb", "team/inbox/" + "a/" * 400]
        ):
            topic.publish(f"odd {n}", {**attributes, "objectId": name})
        topic.publish("deep", {**attributes, "objectId": "x", "payloadFormat": "JSON_API_V1"}, b"[" * 100_000)
        upload(running, exchange, "d.jsonl", FILES["d.jsonl"])
        topic.publish("good", upload(running, exchange, "job.yaml", FILES["job.yaml"]))
        until(lambda: not topic.messages)
        assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]
        assert set(topic.deliveries.values()) == {1}, "each was taken at once"
        assert {letter.attributes["id"] for letter in running.run(dead_letters.listed(store))} == {"deep"}


def test_what_cannot_be_done_now_is_delivered_again(
    topic: Topic, exchange: GcsExchange, doorbells: DoorbellLog
) -> None:
    class Failing(MemoryStore):
        failures = 1

        async def put_if_absent(self, name: str, data: bytes) -> bool:
            from knapper.errors import StoreError

            if name.endswith("/started") and self.failures:
                self.failures -= 1
                raise StoreError("the store is away")
            return await super().put_if_absent(name, data)

    store = Failing()
    with gateway(store, job_services=job_services(exchange, store, doorbells), subscription=SUBSCRIPTION) as running:
        upload(running, exchange, "d.jsonl", FILES["d.jsonl"])
        topic.publish("1", upload(running, exchange, "job.yaml", FILES["job.yaml"]))
        until(lambda: not topic.messages)
        assert topic.deliveries["1"] >= 2
        assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]


def test_a_bucket_that_nobody_tells_of_is_looked_into(
    exchange: GcsExchange, doorbells: DoorbellLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.uploads._LOOK_S", 0.05)
    store = MemoryStore()
    with gateway(store, job_services=job_services(exchange, store, doorbells)) as running:
        upload(running, exchange, "job.yaml", FILES["job.yaml"])
        upload(running, exchange, "d.jsonl", FILES["d.jsonl"])
        until(lambda: bool(doorbells.events))
        time.sleep(0.3)
        assert [event.type for event in doorbells.events] == [cloudevents.JOB_STARTED]


def test_a_subscription_without_its_library_keeps_gateway_and_knapper_up_from_starting(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["google.cloud.pubsub_v1"] = None  # as if it were not installed
import gateway.app
from knapper.cli import main
from knapper.errors import InvalidField
try:
    gateway.app.app
except InvalidField as error:
    print(error)
sys.argv = ["knapper", "up", "--port", "0"]
main.main()
"""
    environment = {**os.environ, "KNAPPER_SUBSCRIPTION": SUBSCRIPTION, "KNAPPER_DATA": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    message = f"KNAPPER_SUBSCRIPTION is {SUBSCRIPTION!r}; allowed: a subscription only with the extra gcp. pip install"
    assert message in ran.stdout
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.returncode == 1
