"""GET /metrics of a function, for Prometheus."""

from starlette.requests import Request
from starlette.responses import Response

from knapper.observability import metrics


def is_scrape(request: Request) -> bool:
    """Whether the request is for the metrics, and not for the function."""
    return request.method == "GET" and request.url.path.endswith("/metrics")


def respond() -> Response:
    return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)
