"""One trace for one bell, whoever handles it; logs of it name it; without a collector nothing happens."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.observability import traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
EVENT = Event(type=cloudevents.JOB_STARTED, subject="t/j/0123456789abcdef", id="1", kind="rl", traceparent=PARENT)


@contextmanager
def collecting() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP collector's address, and what it got."""
    heard: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            sent = gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent
            heard.append(ExportTraceServiceRequest.FromString(sent))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", heard
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    traces.close()


def test_spans_of_three_processes_are_one_trace() -> None:
    """Each hears the event that the one before sent, as it comes over the wire."""
    found = InMemorySpanExporter()
    traces.export_to("test", found)
    event = EVENT
    for process, next_type in (
        ("sample", cloudevents.ROLLOUTS_SAMPLED),
        ("reward", cloudevents.ROLLOUTS_SCORED),
        ("train", ""),
    ):
        heard = cloudevents.decode(*event.encode())
        with traces.span(process, heard.traceparent, subject=heard.subject):
            sent = traces.current(heard.traceparent)
        event = Event(**{**heard.next(next_type or heard.type, process).__dict__, "traceparent": sent})
    traces.close()
    spans = found.get_finished_spans()
    assert [span.name for span in spans] == ["sample", "reward", "train"]
    assert {format(span.context.trace_id, "032x") for span in spans if span.context} == {PARENT.split("-")[1]}
    parents = [format(span.parent.span_id, "016x") for span in spans if span.parent]
    assert parents == [
        PARENT.split("-")[2],
        *(format(span.context.span_id, "016x") for span in spans[:2] if span.context),
    ]
    assert spans[0].attributes == {"knapper.subject": EVENT.subject}


def test_logs_inside_say_what_they_are_about() -> None:
    traces.export_to("test", InMemorySpanExporter())
    with traces.span("train_step", PARENT, run="ses:train:0"):
        bound = structlog.contextvars.get_contextvars()
    assert bound == {"run": "ses:train:0", "trace": PARENT.split("-")[1]}
    assert structlog.contextvars.get_contextvars() == {}


def test_without_a_collector_events_pass_on_what_they_came_with() -> None:
    traces.configure("test", "")
    with traces.span("sample", PARENT, subject="x"):
        assert traces.current(PARENT) == PARENT
        assert structlog.contextvars.get_contextvars() == {"subject": "x"}


def test_an_error_is_in_the_span_and_goes_on() -> None:
    found = InMemorySpanExporter()
    traces.export_to("test", found)
    with pytest.raises(ValueError, match="no"), traces.span("reward"):
        raise ValueError("no")
    traces.close()
    (span,) = found.get_finished_spans()
    assert span.status.description == "ValueError: no"


def test_a_collector_gets_them_over_http() -> None:
    """A server of ours in a collector's place: it reads what comes as OTLP."""
    with collecting() as (url, heard):
        traces.configure("gateway", url)
        with traces.span("ring"):
            pass
        traces.close()
    (resource,) = heard[0].resource_spans
    assert resource.scope_spans[0].spans[0].name == "ring"
    assert {each.key: each.value.string_value for each in resource.resource.attributes}[
        "service.name"
    ] == "knapper-gateway"
