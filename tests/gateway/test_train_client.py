"""How often the gateway rings a pod that answers 503, and how soon its client gets the reason."""

import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from knapper import limits
from knapper.errors import OtherDtype, Unavailable
from knapper.events import cloudevents
from knapper.serving import http
from knapper.web import requests
from tests.gateway.running import MODEL, Running, fwdbwd, gateway, serve

REASONS = {
    "stands": OtherDtype("it was made in float32", retry_after_s=30.0),
    "passes": Unavailable("the store sleeps"),
}


class Refusing:
    """A train_step that can serve no run: the first one of a session meets what stands, the second what passes."""

    def __init__(self) -> None:
        self.doorbells: Counter[str] = Counter()

    async def answer(self, request: Request) -> Response:
        run = cloudevents.run_of(
            cloudevents.decode(request.headers, await requests.body(request, limits.body_bytes_max))
        )
        why = "stands" if run.endswith(":0") else "passes"
        self.doorbells[why] += 1
        return http.error(REASONS[why])


@pytest.fixture
def refusing() -> Refusing:
    return Refusing()


@pytest.fixture
def running(refusing: Refusing) -> Iterator[Running]:
    app = Starlette(routes=[Route("/", refusing.answer, methods=["POST"])])
    with serve(app) as (url, _):
        model = msgspec.structs.replace(MODEL, train_step_url=f"{url}/")
        with gateway(model=model, train_step_url="") as running:
            yield running


def test_what_no_retry_ends_is_not_asked_for_again_and_again_and_is_told_at_once(
    running: Running, refusing: Refusing
) -> None:
    session = running.session()
    stands, passes = running.make_run(session, 0), running.make_run(session, 1)
    for run in (stands, passes):
        running.forward_backward(fwdbwd(run, 1))
    reply = running.http.post("retrieve_future", json={"request_id": f"{stands}:1"}, timeout=20)
    assert reply.status_code == 408, "no result: the operation waits"
    assert "it was made in float32" in reply.headers["x-deprecation-note"]
    end = time.monotonic() + 20
    while refusing.doorbells["passes"] < 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert refusing.doorbells["passes"] >= 4
    assert refusing.doorbells["stands"] == 1
