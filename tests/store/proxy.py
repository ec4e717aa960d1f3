"""A proxy before the emulator, which does to requests what networks and busy servers do."""

import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import httpx

Fault = Literal["", "503", "429", "403", "before", "after", "torn", "flipped", "slow"]
FAULTS: tuple[Fault, ...] = ("503", "429", "before", "after", "torn", "flipped", "slow")
_SLOW_S = 0.3
_OURS = {"connection", "content-length", "content-encoding", "transfer-encoding", "keep-alive", "date", "server"}


@dataclass
class Proxy:
    """`choose(method, path)` says what becomes of the next request.

    `before`: the connection is cut and the request lost; `after`: it is cut once the request was obeyed; `torn`: half
    of the answer's body comes; `flipped`: all of it, with one bit changed.
    """

    url: str
    choose: Callable[[str, str], Fault] = lambda _method, _path: ""
    met: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)  # the methods and paths, as they came


@contextmanager
def before(upstream: str) -> Iterator[Proxy]:
    """One on a port of its own."""
    proxy = Proxy("")
    with httpx.Client(base_url=upstream, trust_env=False) as client:
        server = _Server(("127.0.0.1", 0), lambda *connection: _Exchange(proxy, client, *connection))
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            serving.join()
            server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news here."""


class _Exchange(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out one by one: else 40 ms an answer

    def __init__(self, proxy: Proxy, client: httpx.Client, *connection: object) -> None:
        self._proxy, self._client = proxy, client
        super().__init__(*connection)  # type: ignore[arg-type]  # as the server calls it

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self._proxy.choose(self.command, self.path)
        self._proxy.requests.append(f"{self.command} {self.path}")
        self._proxy.met[fault] += bool(fault)
        if fault == "before":
            self._cut()
        elif fault in ("503", "429", "403"):
            self._answer(int(fault), [("Content-Type", "application/json")], b'{"error": {"message": "injected"}}')
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: Fault) -> None:
        if fault == "slow":
            time.sleep(_SLOW_S)
        sent = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        sent["Accept-Encoding"] = "identity"
        answer = self._client.request(self.command, self.path, headers=sent, content=body)
        if fault == "after":
            self._cut()
            return
        headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in _OURS]
        content = answer.content
        if fault == "flipped" and content and self.path.startswith("/download"):
            content = bytes([content[0] ^ 1]) + content[1:]
        self._answer(answer.status_code, headers, content, torn=fault == "torn")

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, torn: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if torn else body)
        if torn:
            self.wfile.flush()
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_args: object) -> None:
        """Silent."""
