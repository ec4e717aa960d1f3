"""Traces the effects of an event through gateway, Broker and functions, if KNAPPER_TRACES names a collector.

Events carry `traceparent` (W3C Trace Context) between processes. Without a collector, OpenTelemetry is not imported,
and events pass on the `traceparent` they came with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from knapper.errors import InvalidField

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_provider: Any = None  # of this process; None: no collector


def configure(process: str, collector: str) -> None:
    """Send this process's spans to an OTLP collector over HTTP; empty: nowhere. Raises InvalidField."""
    if not collector:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise InvalidField(
            "KNAPPER_TRACES", collector, "empty without the extra traces", "pip install 'knapper[traces]'"
        ) from error
    export_to(process, OTLPSpanExporter(endpoint=f"{collector.rstrip('/')}/v1/traces"))


def export_to(process: str, exporter: "SpanExporter") -> None:
    """Send this process's spans there, in batches, from a thread of their own."""
    global _provider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"knapper-{process}", "service.namespace": "knapper"})
    _provider = TracerProvider(resource=resource)
    _provider.add_span_processor(BatchSpanProcessor(exporter))


def close() -> None:
    """Send the remaining spans, and stop."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


@contextmanager
def span(name: str, traceparent: str = "", **attributes: str) -> Iterator[None]:
    """A span below `traceparent`, whose id is in all log lines inside.

    Records an error that leaves it.
    """
    with structlog.contextvars.bound_contextvars(**attributes):
        if _provider is None:
            yield
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
        own = {f"knapper.{key}": value for key, value in attributes.items()}
        with _provider.get_tracer("knapper").start_as_current_span(name, context=parent, attributes=own) as here:
            trace = format(here.get_span_context().trace_id, "032x")
            with structlog.contextvars.bound_contextvars(trace=trace):
                yield


def current(otherwise: str = "") -> str:
    """The traceparent to send on: the current span's, or `otherwise`."""
    if _provider is None:
        return otherwise
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", otherwise)
