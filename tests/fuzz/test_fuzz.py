"""Whatever comes in, a server answers as it should, a healthy client beside it notices nothing, and it serves on.

`make fuzz` sends fifty thousand bodies; this is the same with a few hundred.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.conformance.server import Server
from tests.fuzz import asks, fuzz, mutations
from tests.fuzz.bodies import World
from tests.fuzz.senders import Sender
from tests.fuzz.verdict import Answer, fault

SEED, BODIES = 5, 250
WAY = ("POST", "/api/v1/create_model")


def test_every_route_has_a_legal_request() -> None:
    unknown = [f"{method} {path}" for method, path in asks.routes() if (method, path) not in asks.ASKS]
    assert not unknown, f"say in ASKS of {asks.__file__} what a legal request of {', '.join(unknown)} is"
    assert not set(asks.ASKS) - set(asks.routes()), "routes that are gone"


@pytest.mark.timeout(300)
def test_no_body_is_answered_wrongly_or_disturbs_a_neighbour(tmp_path: Path) -> None:
    report = fuzz.run(fuzz.model(tmp_path), tmp_path / "data", seed=SEED, first=0, count=BODIES, senders=2)
    assert not report.faults, "\n".join(report.faults)
    assert report.bodies == BODIES
    assert set(report.by_way) == set(asks.routes())
    assert report.turns > 1
    assert sum(count for status, count in report.statuses.items() if status < 300) > BODIES // 6, "much is served"


@pytest.fixture(scope="module")
def sender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    place = tmp_path_factory.mktemp("fuzz")
    model, data = fuzz.model(place), place / "data"
    with Server.start(model, data, settings=fuzz.SETTINGS) as server:
        sender = Sender(server.url, str(model), data, lambda: asks.never(0), itertools.count())
        yield sender
        sender.close()


UNSERVED = {
    "/api/v1/create_custom_loss": 422, f"{asks.ONE}/archive": 422, "/api/v1/links/{token}": 404, "/v1/{path:path}": 404,
    "/oai/api/v1/{path:path}": 404,
    # The console's: for browsers that are not signed in, for administrators, for other kinds of jobs, and streams.
    "/signin": 303, "/signout": 303, "/admin": 404, "/admin/keys": 404, "/admin/keys/revoke": 404,
    "/runs/{run_id}/live": 422, "/jobs/{job}/live": 422,
    "/runs/{run_id}/passes/{seq}": 404, "/runs/{run_id}/passes/{seq}/{datum}": 404,
    "/jobs/{job}/rollouts/{round}/{n}": 404, "/jobs/{job}/rollouts/{round}/{n}/{part}/{sample}": 404,
}  # fmt: skip


@pytest.mark.parametrize("way", asks.ASKS, ids=" ".join)
def test_what_is_mutated_is_served_as_long_as_it_is_not(way: asks.Way, sender: Sender) -> None:
    sender.renew()
    varied = way[0] == "POST" and "{" not in way[1]
    for n in range(20 if way[1].endswith("/rewards") else 3 if varied else 1):
        answer = sender.legal(way, Random(n))
        assert answer.status in (200, 204) if way[1] not in UNSERVED else answer.status == UNSERVED[way[1]], answer


def test_a_body_is_the_same_each_time_that_it_is_made() -> None:
    world = World("m", "k", asks.never(1), asks.never(2), asks.never(3), lambda: "tml-")
    ways = asks.routes()

    def made(n: int) -> object:
        rng, way = Random(f"7/{n}"), ways[n % len(ways)]
        ask = mutations.mutate(asks.legal(way, world, rng), world, rng)
        return mutations.path_of(way[1], ask), mutations.content(ask, rng)

    first = [made(n) for n in range(300)]
    assert first == [made(n) for n in range(300)]
    assert len({repr(each) for each in first}) > 250


GOOD = b'{"detail": "rank is 0; allowed: 1 to 256", "code": "invalid_field", "category": "user"}'


@pytest.mark.parametrize(
    ("status", "headers", "body", "wrong"),
    [
        (200, {}, b"{}", None),
        (422, {}, GOOD, None),
        (503, {"Retry-After": "1"}, b"{}", None),
        (429, {"retry-after": "1"}, b"{}", None),
        (500, {"Retry-After": "1"}, b"{}", "status 500"),
        (503, {}, b"{}", "status 503"),
        (400, {}, b"Invalid HTTP request received.", "without the error's form"),
        (422, {}, b'{"detail": "", "code": "x", "category": "user"}', "without what is wrong"),
        (422, {}, GOOD.replace(b"user", b"server"), "not the user's"),
        (422, {}, GOOD.replace(b"allowed", b"known"), "does not say the field"),
        (422, {}, GOOD.replace(b"rank", b"rank" * 10_000), "an error of"),
        (200, {"content-type": "text/event-stream"}, b'data: {"type": "server_error"}', "blames the server"),
    ],
)
def test_a_wrong_answer_is_seen(status: int, headers: dict[str, str], body: bytes, wrong: str | None) -> None:
    problem = fault(WAY, Answer(status, headers, body))
    assert problem is None if wrong is None else wrong in (problem or "")


@pytest.mark.parametrize(
    ("path", "kind", "wrong"),
    [
        ("/v1/messages", "not_found_error", None),
        ("/v1/messages/count_tokens", "not_found_error", None),
        ("/v1/messages", "invalid_request_error", "not the user's"),
        ("/v1/messages", "api_error", "not the user's"),
        ("/v1/chat/completions", "invalid_request_error", None),
        ("/v1/chat/completions", "not_found_error", "not the user's"),
    ],
)
def test_each_protocol_has_its_word_for_what_is_not_found(path: str, kind: str, wrong: str | None) -> None:
    body = json.dumps({"error": {"message": "no such model", "code": "not_found", "type": kind}}).encode()
    problem = fault(("POST", path), Answer(404, {}, body))
    assert problem is None if wrong is None else wrong in (problem or "")


def test_a_result_that_blames_the_server_is_seen() -> None:
    answer = Answer(200, {}, b'{"error": "oops", "category": "server"}')
    assert "oops" in (fault(("POST", "/api/v1/retrieve_future"), answer) or "")


def test_a_traceback_in_the_log_is_seen_with_its_end() -> None:
    log = "12:00 info gateway: x\nTraceback (most recent call last):\n  File a\nValueError: b\n12:00 info engine: y\n"
    [traceback] = fuzz.tracebacks(log)
    assert "ValueError: b" in traceback
    assert fuzz.tracebacks("12:00 info gateway: nothing") == []
