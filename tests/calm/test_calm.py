"""While one client sends the worst body of a route, others do not wait: a health check is answered within 250 ms.

`make calm` sends every body, plain and as zstd; CI those that handlers read to their end, as zstd. What
is asserted: the longest that /healthz took, asked every 50 ms, less what a server that does nothing took at the same
moment (tests/calm/watched.py), in the best of three sendings; and the most memory that the gateway and its workers ever
had.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gateway.app import create_app
from gateway.routing import Door
from knapper import limits
from knapper.store.memory import MemoryStore
from knapper.wire import zstd
from tests.calm.watched import Watched, watched
from tests.calm.worst import GENERIC, Objects, Worst, legal
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model
from tests.gateway.running import settings

WAIT_S_MAX = 0.25
GATEWAY_BYTES_MAX = 800 * limits.MIB
WORKER_BYTES_MAX = limits.worker_memory_bytes + 256 * limits.MIB
_AGAIN = 2  # a server that freezes does so each time; one that a busy machine left aside for a moment does not
CONTEXT = 131_072
NOBODY = Objects("s", "r", "s", "m", "c")


def doors() -> list[tuple[str, Door]]:
    """(method, route) of all that there are; a route of another kind has no limit, and is none."""
    routes = create_app(MemoryStore(), settings()).routes
    others = [route for route in routes if not isinstance(route, Door)]
    assert not others, f"routes without a limit: {others}"
    routes_with_limits = [route for route in routes if isinstance(route, Door)]
    return [(method, door) for door in routes_with_limits for method in sorted((door.methods or set()) - {"HEAD"})]


def test_every_route_has_a_limit_and_its_worst_bodies() -> None:
    """A new route with a body needs a line in tests/calm/worst.py."""
    with_body = {door.path for _, door in doors() if door.body_bytes_max}
    assert with_body == set(legal(NOBODY))
    assert all(worst for worst in legal(NOBODY).values())


def test_every_route_has_a_value_for_each_part_of_its_path() -> None:
    """A new parameter needs a value in `Objects.in_path`: without it `make calm` ends before its last routes."""
    assert all("{" not in NOBODY.path(door.path) for _, door in doors())


def test_limits_are_the_least_that_their_routes_need() -> None:
    large = {door.path.rpartition("/")[2] for _, door in doors() if door.body_bytes_max > 2 * limits.MIB}
    assert large == {
        "forward", "forward_backward", "asample", "rewards", "jobs", "completions", "responses", "messages",
        "count_tokens", "{offset}",
    }  # fmt: skip
    assert max(door.body_bytes_max for _, door in doors()) == limits.body_bytes_max


@dataclass(frozen=True)
class Calm:
    server: Server
    objects: Objects
    watched: Watched

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, float]:
        """(status, how long others waited meanwhile)"""
        begin = time.monotonic()
        try:
            with httpx.Client(base_url=self.server.url, headers={"X-API-Key": "tml-local"}, timeout=300) as client:
                status = client.request(method, path, content=body, headers=headers).status_code
        finally:
            end = time.monotonic() + 0.1
        return status, self.watched.waited(begin, end)

    def memory(self) -> dict[int, int]:
        """The most bytes that the gateway, first, and each of its workers ever had, by pid."""
        gateway = self.server.processes()["gateway"]
        pids = [gateway, *(pid for pid in self.server.members("gateway") if pid != gateway)]
        return {pid: peak for pid in pids if (peak := _peak(pid))}


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 if "VmHWM:" in status else 0


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    directory = tmp_path_factory.mktemp("calm")
    model = tiny_model(directory / "tiny", context=CONTEXT)
    with Server.start(model, directory / "data") as server, watched(server.url, directory) as watching:
        yield Calm(server, _objects(server, str(model)), watching)


def _objects(server: Server, model: str) -> Objects:
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-local"}, timeout=60) as client:

        def ask(where: str, **sent: object) -> dict[str, str]:
            reply = client.post(where, json=sent)
            assert reply.status_code == 200, reply.text
            answer: dict[str, str] = reply.json()
            return answer

        session = ask("create_session")["session_id"]
        run = ask("create_model", session_id=session, model_seq_id=0, base_model=model, lora_config={"rank": 4})
        sampler = ask("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=model)
        saved = ask("save_weights", model_id=run["model_id"], seq_id=1, path="worst")["request_id"]
        while client.post("retrieve_future", json={"request_id": saved}).status_code == 408:
            pass
    path = f"tinker://{run['model_id']}/weights/worst"
    return Objects(session, run["model_id"], sampler["sampling_session_id"], model, path)


def _sent(worst: Worst, size: int, *, packed: bool) -> tuple[bytes, dict[str, str]]:
    body = worst.make(size)
    assert len(body) <= size
    headers = {"Content-Type": worst.content_type}
    return (zstd.compress(body, 1), {**headers, "Content-Encoding": "zstd"}) if packed else (body, headers)


def _expect_calm(calm: Calm, sendings: list[tuple[str, Door, Worst, bool]]) -> None:
    slow, wrong = [], []
    for method, door, worst, packed in sendings:
        body, headers = _sent(worst, door.body_bytes_max or limits.MIB, packed=packed)
        path = calm.objects.path(door.path)
        status, waited = calm.send(method, path, body, headers)
        for _ in range(_AGAIN):
            if waited <= WAIT_S_MAX:
                break
            status, waited = calm.send(method, path, body, headers)
        size = f"{len(body)} bytes{' of zstd' if packed else ''}"
        summary = f"{method} {door.path}, {worst.name}, {size}: {status}, {waited:.3f} s"
        print(summary)
        if waited > WAIT_S_MAX:
            slow.append(summary)
        if status >= 500:
            wrong.append(summary)
    assert not slow, "others waited too long:\n" + "\n".join(slow)
    assert not wrong, "the server is not at fault:\n" + "\n".join(wrong)
    gateway, *workers = calm.memory().values()
    print(f"memory: gateway {gateway >> 20} MiB, workers {[each >> 20 for each in workers]} MiB")
    assert gateway < GATEWAY_BYTES_MAX
    assert all(each < WORKER_BYTES_MAX for each in workers)
    assert workers, "large bodies are decoded in workers"


@pytest.mark.long  # what takes time is measured with nothing else beside it: `make calm`, and a step of CI
@pytest.mark.timeout(900)
def test_nobody_waits_for_the_worst_that_is_read(calm: Calm) -> None:
    bodies = legal(calm.objects)
    _expect_calm(calm, [(method, door, worst, True) for method, door in doors() for worst in bodies.get(door.path, [])])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nobody_waits_for_the_worst_of_all(calm: Calm) -> None:
    bodies = legal(calm.objects)
    _expect_calm(
        calm,
        [
            (method, door, worst, packed)
            for method, door in doors()
            for worst in [*bodies.get(door.path, []), *GENERIC]
            for packed in (False, True)
        ],
    )
