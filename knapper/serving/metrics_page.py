"""GET /metrics of a function: what Prometheus sees of it, beside the work that it is called for."""

from starlette.requests import Request
from starlette.responses import Response

from knapper.observability import metrics


def asked(request: Request) -> bool:
    """Whether this is a scrape, and no call."""
    return request.method == "GET" and request.url.path.endswith("/metrics")


def answer() -> Response:
    return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)
