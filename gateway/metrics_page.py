"""GET /metrics: the gateway's metrics, for Prometheus, which scrapes the pod's own address.

There is no key, so a request by host name, as through an ingress, gets 404.
"""

from collections import Counter
from ipaddress import ip_address

from starlette.requests import Request
from starlette.responses import Response

from gateway.routing import Door
from gateway.services import services_of
from knapper.errors import KnapperError, NotFound
from knapper.ids import RunId
from knapper.observability import metrics


class Ages:
    """Since when runs wait, as seen by scrapes: each applied operation restarts a run's wait."""

    def __init__(self) -> None:
        self._since: dict[RunId, tuple[int, float]] = {}

    def oldest(self, waiting: dict[RunId, int], now: float) -> float:
        """The longest wait in seconds. `waiting`: the newest applied operation of each run that waits."""
        self._since = {
            run: self._since[run] if self._since.get(run, (-2, 0.0))[0] == applied else (applied, now)
            for run, applied in waiting.items()
        }
        return max((now - since for _, since in self._since.values()), default=0.0)


_ages = Ages()


async def scrape(request: Request) -> Response:
    """The metrics of this process, with the current length of its queues."""
    _expect_address(request)
    gateway = services_of(request)
    waiting = gateway.train_client.unfinished()
    models: Counter[str] = Counter()
    for run in waiting:
        try:
            models[(await gateway.lookups.spec_of(run)).base_model] += 1
        except KnapperError:  # deleted, or the store is unavailable: the scrape succeeds all the same
            models["unknown"] += 1
    metrics.runs_waiting.clear()
    for model, count in models.items():
        metrics.runs_waiting.labels(model).set(count)
    applied = {run: gateway.results.applied(run) for run in waiting}
    metrics.queue_age_seconds.set(_ages.oldest(applied, gateway.clock()))
    metrics.samples_waiting.set(gateway.sample_queue.open)
    return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)


def _expect_address(request: Request) -> None:
    """Raises NotFound for a request by host name: an ingress routes by names, and never to an address."""
    host = request.url.hostname or ""
    try:
        ip_address(host)
    except ValueError as error:
        if host != "localhost":
            raise NotFound("there is nothing at /metrics") from error


ROUTES = [Door("/metrics", scrape, methods=["GET"], body_bytes_max=0)]
