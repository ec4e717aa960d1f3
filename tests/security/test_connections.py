"""Who has no key cannot hold a server: headers, bodies and connections have bounds and deadlines.

A real uvicorn with the protocol that all of our processes serve by; deadlines are shortened, their kinds are not.
"""

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from knapper import limits
from knapper.web import connections
from tests.gateway.running import serve

HEAD = b"GET /empty HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /length HTTP/1.1\r\nHost: x\r\n"


async def empty(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def length(request: Request) -> Response:
    return JSONResponse({"length": len(await request.body())})


async def busy(request: Request) -> Response:
    """Reads nothing for longer than a body may be silent."""
    await asyncio.sleep(2.5)
    return await length(request)


async def early(_request: Request) -> Response:
    return JSONResponse({"detail": "refused before it was read"}, status_code=413)


async def endless(_request: Request) -> Response:
    async def much() -> object:
        for _ in range(1000):
            yield bytes(1024 * 1024)

    return StreamingResponse(much())  # type: ignore[arg-type]


ROUTES = [Route(f"/{each.__name__}", each, methods=["GET", "POST"]) for each in (empty, length, busy, early, endless)]


@pytest.fixture
def port() -> Iterator[int]:
    with serve(Starlette(routes=ROUTES)) as (url, _):
        yield int(url.rpartition(":")[2])


def connect(port: int) -> socket.socket:
    ours = socket.create_connection(("127.0.0.1", port))
    ours.settimeout(15)
    return ours


def ask(port: int, *chunks: bytes) -> bytes:
    """What comes until the server hangs up, or has answered once and waits."""
    with connect(port) as ours:
        for chunk in chunks:
            try:
                ours.sendall(chunk)
            except OSError:
                break  # it has hung up already; its answer is still there
        return heard(ours)


def heard(ours: socket.socket) -> bytes:
    """All of one answer, or what came before the end."""
    got = b""
    try:
        while data := ours.recv(65536):
            got += data
            head, _, body = got.partition(b"\r\n\r\n")
            if b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n":
                return got
    except ConnectionResetError:
        pass
    return got


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_headers_at_the_limit_pass_and_a_byte_more_does_not(port: int) -> None:
    used = len("/empty") + len("Host" + "x") + len("X-A")
    answer = b""
    for over, expected in ((0, 200), (1, 431)):
        value = b"a" * (limits.head_bytes_max - used + over)
        answer = ask(port, HEAD + b"X-A: " + value + b"\r\n\r\n")
        # The bytes between names and values count until the headers are whole, where they come in several pieces.
        assert status(answer) == expected, answer[:300]
    assert b'"code": "headers_too_large"' in answer
    assert str(limits.head_bytes_max).encode() in answer


def test_as_many_headers_as_allowed_pass_and_one_more_does_not(port: int) -> None:
    for more, expected in ((limits.head_fields_max - 1, 200), (limits.head_fields_max, 431)):
        assert status(ask(port, HEAD + b"".join(b"X-%d: a\r\n" % n for n in range(more)) + b"\r\n")) == expected


@pytest.mark.parametrize(
    "head",
    [HEAD + b"X-A: ", b"GET /", b"GET /empty HTTP/1.1\r\nHost: x\r\nX-",
     POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-A: "],
    ids=["a value", "a URL", "a name", "a trailer"],
)  # fmt: skip
def test_what_never_ends_is_not_kept(port: int, head: bytes) -> None:
    """Sixty megabytes in pieces: the parser would copy all that came, for every piece."""
    answer = ask(port, head, *[b"a" * 2**20] * 60)
    assert status(answer) == 431, answer[:300]
    assert status(ask(port, HEAD + b"\r\n")) == 200


def test_what_is_no_http_is_a_bad_request(port: int) -> None:
    answer = ask(port, b"HELLO\r\n\r\n")
    assert status(answer) == 400
    assert answer.endswith(b'"code": "invalid_request", "category": "user"}')


def test_a_thousand_requests_at_once_are_not_queued(port: int) -> None:
    got = ask(port, (HEAD + b"\r\n") * 1000)
    assert got.count(b"HTTP/1.1 ") <= limits.pipelined_max + 2
    assert status(ask(port, HEAD + b"\r\n")) == 200


def test_as_many_requests_at_once_as_may_wait_are_all_answered(port: int) -> None:
    with connect(port) as ours:
        ours.sendall((HEAD + b"\r\n") * (limits.pipelined_max + 1))
        got = b""
        while got.count(b"HTTP/1.1 200") < limits.pipelined_max + 1:
            got += ours.recv(65536)


def test_a_body_in_chunks_of_a_byte_is_put_together(port: int) -> None:
    chunks = b"1\r\na\r\n" * 300_000 + b"0\r\n\r\n"
    answer = ask(port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert answer.endswith(b'{"length":300000}')


@pytest.mark.parametrize(
    ("sent", "expected"),
    [(b"", 408), (b"GET /", 408), (HEAD, 408), (POST + b"Content-Length: 9000000\r\n\r\n{", 408), (b"\r\n", 408),
     (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408)],
    ids=["nothing", "half a line", "half of the headers", "half a body", "an empty line", "a chunk"],
)  # fmt: skip
def test_half_a_request_is_hung_up_on(port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes, expected: int) -> None:
    monkeypatch.setattr(limits, "head_s", 1.0)
    monkeypatch.setattr(limits, "body_stalled_s", 1.0)
    with connect(port) as ours:
        ours.sendall(sent)
        assert status(heard(ours)) == expected
        assert ours.recv(1) == b""


def test_a_second_request_has_a_deadline_too(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "head_s", 1.0)
    with connect(port) as ours:
        ours.sendall(HEAD + b"\r\n")
        assert status(heard(ours)) == 200
        ours.sendall(b"GET /")
        assert status(heard(ours)) == 408


def test_drops_of_a_body_are_too_slow_and_a_slow_stream_is_not(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "body_stalled_s", 1.0)
    for size, expected in ((1, 408), (limits.body_rate_min, 200)):
        with connect(port) as ours:
            ours.sendall(POST + b"Content-Length: %d\r\n\r\n" % (size * 16))
            try:
                for _ in range(16):
                    ours.sendall(b"a" * size)
                    time.sleep(0.25)
            except OSError:
                pass
            assert status(heard(ours)) == expected


def test_a_client_is_not_blamed_for_a_server_that_does_not_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "body_stalled_s", 0.5)
    body = b"a" * 3_000_000
    with connect(port) as ours:
        ours.sendall(b"POST /busy HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        ours.sendall(body)
        assert heard(ours).endswith(b'{"length":3000000}')


def test_the_answer_to_a_body_that_is_not_read_is_heard(port: int) -> None:
    """Clients listen once they have sent everything; what they send is thrown away, up to a bound."""
    with connect(port) as ours:
        ours.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n")
        ours.sendall(bytes(50_000_000))
        assert status(heard(ours)) == 413
        ours.sendall(HEAD + b"\r\n")  # and the connection is as good as new
        assert status(heard(ours)) == 200


def test_an_empty_line_after_a_body_does_not_hurry_its_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "head_s", 0.5)
    with connect(port) as ours:
        ours.sendall(b"POST /busy HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na\r\n")
        assert heard(ours).endswith(b'{"length":1}')


def test_no_end_of_a_body_is_thrown_away(port: int) -> None:
    size, sent = 500_000_000, 0
    with connect(port) as ours:
        ours.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        try:
            while sent < size:
                sent += ours.send(bytes(2**20))
        except OSError:
            pass
        assert sent < limits.body_discarded_bytes_max * 1.5
        assert status(heard(ours)) == 413


def test_who_takes_nothing_of_an_answer_is_hung_up_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "answer_stalled_s", 1.0)
    with connect(port) as ours:
        ours.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(4)
        got = 0
        try:
            while data := ours.recv(2**20):
                got += len(data)
        except ConnectionResetError:
            pass
        assert got < 100 * 2**20


def test_among_too_many_connections_those_who_ask_for_nothing_go_first(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "connections_max", 4)
    idle = [connect(port) for _ in range(3)]
    time.sleep(0.2)
    with connect(port) as working:
        working.sendall(b"GET /busy HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.2)
        for _ in range(4):
            assert status(ask(port, HEAD + b"\r\n")) == 200
        assert idle[0].recv(1) == b"", "the oldest made room"
        assert heard(working).endswith(b'{"length":0}')
    for each in idle:
        each.close()


def test_when_all_connections_work_another_is_told_to_come_later(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "connections_max", 2)
    working = [connect(port) for _ in range(2)]
    for each in working:
        each.sendall(b"GET /busy HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.3)
    answer = ask(port, HEAD + b"\r\n")
    assert status(answer) == 503
    assert b"retry-after: 1" in answer
    for each in working:
        assert heard(each).endswith(b'{"length":0}')
        each.close()


def test_a_quarter_of_the_files_is_kept_for_others() -> None:
    assert 0 < connections._connections_max() <= limits.connections_max
