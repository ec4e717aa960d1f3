"""Who sends: a connection, the objects that its requests name, and what became of a request."""

import asyncio
import hashlib
import http.client
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

from knapper.ids import EpisodeName, Tenant
from knapper.state.api_keys import Keys
from knapper.state.captures import Captures
from knapper.store.directory import DirectoryStore
from tests.fuzz import asks, bodies, json_body, mutations
from tests.fuzz.asks import Way
from tests.fuzz.bodies import PROTOBUF, Text, World
from tests.fuzz.verdict import Answer, fault
from tests.gateway.captured import captured_turn
from tests.security.test_doors import Objects

_ANSWER_S = 90.0  # the longest that any route but a poll may take, on a machine with much else to do
_POLL_S = 2.0  # who waits for nothing hangs up
_RENEW = 200  # bodies after which a sender makes its objects anew
_POLLS = ("/api/v1/retrieve_future", "/api/v1/retrieve_futures")


@dataclass(frozen=True)
class Sent:
    """What was sent, as it went out."""

    n: int
    way: Way
    url: str
    headers: dict[str, str]
    body: bytes


def new_key(data: Path, tenant: str, number: int) -> str:
    """A key of the tenant, made beside the server, as `knapper key create` does."""
    keys = Keys(DirectoryStore(data / "store"), time.time)
    made, _ = asyncio.run(keys.create(Tenant(tenant), "", lambda: hashlib.sha256(b"%d" % number).hexdigest()))
    return made


def capture(data: Path, tenant: str, episode: str, number: int) -> None:
    """Keep a turn of the episode, as a gateway does."""
    captures = Captures(DirectoryStore(data / "store"), time.time, lambda: f"{number:032x}")
    asyncio.run(captures.keep(Tenant(tenant), EpisodeName("", episode), captured_turn()))


class Sender:
    """One tenant's connection. Bodies are numbered: body `n` of a seed is always the same but for names and numbers."""

    def __init__(self, url: str, model: str, data: Path, theirs: Callable[[], Objects], numbers: Iterator[int]) -> None:
        self._address = urlsplit(url).netloc
        self._model, self._data, self._theirs, self._numbers = model, data, theirs, numbers
        self._key = new_key(data, "mallory", next(numbers))
        self._connection = http.client.HTTPConnection(self._address)
        self._world: World | None = None
        self._asked = 0

    def send(self, seed: int, n: int, ways: list[Way]) -> tuple[Sent, Answer | None, str | None]:
        """Send body `n`: what went out, the answer (None: it was held until we hung up), and what is wrong with it."""
        if self._world is None or self._asked % _RENEW == 0:
            self.renew()
        assert self._world is not None, "made anew just now"
        self._asked += 1
        rng, world = Random(f"{seed}/{n}"), self._world
        way = ways[n % len(ways)]
        ask = mutations.mutate(asks.legal(way, world, rng), world, rng)
        headers, body = mutations.content(ask, rng)
        sent = Sent(n, way, mutations.path_of(way[1], ask), headers, body)
        try:
            answer = self._ask(sent, _POLL_S if way[1] in _POLLS else _ANSWER_S)
        except TimeoutError:
            return sent, None, None if way[1] in _POLLS else f"no answer within {_ANSWER_S:.0f} s"
        except (http.client.HTTPException, OSError) as error:
            return sent, None, f"the connection broke: {error!r}"
        return sent, answer, fault(way, answer) or self._settle(world, way, answer)

    def legal(self, way: Way, rng: Random) -> Answer:
        """The answer to a request as it is before any mutation, and what came of it if it was a promise."""
        assert self._world is not None, "`renew` came first"
        ask = asks.legal(way, self._world, rng)
        headers, body = dict(ask.headers), mutations.body_of(ask)
        answer = self._ask(Sent(0, way, mutations.path_of(way[1], ask), headers, body), _ANSWER_S)
        self._settle(self._world, way, answer)
        return answer

    def renew(self) -> None:
        """New objects, and an end to those before."""
        if self._world is not None:
            self._post(f"sessions/{self._world.mine.session}/finish", {"reason": {"type": "success"}})
        session = self._made("create_session", {"tags": []})["session_id"]
        create = {"session_id": session, "model_seq_id": 0, "base_model": self._model, "lora_config": {"rank": 2}}
        run = self._made("create_model", create)["model_id"]
        for seq, route in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), 1):
            self._made(route, {"model_id": run, "seq_id": seq, "path": "ckpt"})
        self._result(f"{run}:3", 60.0)
        asked = {"session_id": session, "sampling_session_seq_id": 0, "base_model": self._model}
        sampler = self._made("create_sampling_session", asked)["sampling_session_id"]
        mine = Objects(session, run, sampler, "s-" + "0" * 32, "ckpt", f"job-{session[4:12]}")
        never = asks.never(next(self._numbers))
        world = World(self._model, self._key, mine, self._theirs(), never, self._spare_key, seq=4)
        sample = {**bodies.sample(world, Random(0)), "seq_id": 10**6}
        world.mine = replace(mine, sample=self._made("asample", sample)["request_id"])
        files = {"job.yaml": Text([bodies.SHORT_JOB]), "d.jsonl": '{"prompt": "a", "completion": "b"}'}
        self._post("jobs", {"name": mine.job, "files": files})
        self._post(f"jobs/{mine.job}/cancel", None)
        capture(self._data, "mallory", mine.job, next(self._numbers))
        self._world = world

    def close(self) -> None:
        self._connection.close()

    def _spare_key(self) -> str:
        return new_key(self._data, "mallory", next(self._numbers))

    def _settle(self, world: World, way: Way, answer: Answer) -> str | None:
        """Wait for what was promised, where it is not held up by something that never comes."""
        content = answer.json()
        if way == ("POST", "/api/v1/jobs") and answer.status == 200:
            self._post(f"jobs/{content['job']}/cancel", None)
            return None
        if answer.status == 422 and f"seq_id {world.seq} of {world.mine.run} was used before" in str(content):
            world.seq += 1
        request_id = content.get("request_id") if isinstance(content, dict) and answer.status == 200 else None
        if not isinstance(request_id, str) or way[1] in _POLLS:
            return None
        expected = request_id == f"{world.mine.run}:{world.seq}"
        world.seq += expected
        if not expected and not request_id.endswith(":0") and not request_id.startswith("s-"):
            return None
        result = self._result(request_id, _POLL_S if request_id.startswith("s-") else 60.0)
        if result is None and request_id.startswith("s-"):
            self._post("cancel_future", {"request_id": request_id})
        if result is None:
            return None if request_id.startswith("s-") else f"no result of {request_id} within a minute"
        return fault(("POST", _POLLS[0]), result)

    def _result(self, request_id: str, within_s: float) -> Answer | None:
        """Of a promise, or None when the time is over."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            try:
                answer = self._post("retrieve_future", {"request_id": request_id}, until - time.monotonic() + 0.1)
            except TimeoutError:
                return None
            if answer.status not in (408, 503):
                return answer
        return None

    def _made(self, path: str, body: Any) -> Any:
        while (answer := self._post(path, body)).status in (429, 503):
            time.sleep(0.5)
        assert answer.status == 200, f"{path}: {answer}"
        return answer.json()

    def _post(self, path: str, body: Any, timeout_s: float = _ANSWER_S) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": PROTOBUF}
        content = b"" if body is None else json_body.encode(body)
        return self._ask(Sent(0, ("POST", path), f"/api/v1/{path}", headers, content), timeout_s)

    def _ask(self, sent: Sent, timeout_s: float) -> Answer:
        """Raises TimeoutError, HTTPException or OSError; the next request takes another connection then."""
        headers = {"Host": self._address, "X-API-Key": self._key} | sent.headers
        for attempt in itertools.count():
            with _fresh_unless_whole(self):
                connection = self._connection
                again = connection.sock is not None and attempt == 0
                connection.timeout = timeout_s
                try:
                    if connection.sock is not None:
                        connection.sock.settimeout(timeout_s)
                    connection.putrequest(sent.way[0], sent.url, skip_host=True, skip_accept_encoding=True)
                    for name, value in headers.items():
                        connection.putheader(name, value.encode("latin-1"))
                    connection.putheader("Content-Length", str(len(sent.body)))
                    connection.endheaders(sent.body)
                    response = connection.getresponse()
                    return Answer(response.status, dict(response.getheaders()), response.read())
                except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                    if not again:  # an old connection may have been closed by the server
                        raise
            self._connection = http.client.HTTPConnection(self._address)
        raise AssertionError("it is counted for ever")


@contextmanager
def _fresh_unless_whole(sender: Sender) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sender._connection.close()
        sender._connection = http.client.HTTPConnection(sender._address)
        raise
