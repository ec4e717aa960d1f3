"""A gateway without keys answers to its machine's own names and its own pages; with keys it checks neither."""

import http.client
import re
import socket
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest

from knapper.errors import InvalidField
from knapper.settings import Settings
from tests.gateway.running import Running, gateway
from tests.security.test_doors import ROUTES

OWN = ["127.0.0.1", "127.0.0.1:8000", "127.7.7.7", "localhost", "LOCALHOST:1", "localhost.", "localhost.:8000", "[::1]",
       "[::1]:8000", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]:80", "localhost:"]  # fmt: skip
READ = "/api/v1/get_server_capabilities"
FOREIGN = ["attacker.example", "attacker.example:8000", "localhost.attacker.example", "127.0.0.1.attacker.example",
           "attacker.example.", "0.0.0.0:8000", "[::]", "10.0.0.7", "[::ffff:10.0.0.7]", "169.254.169.254",
           "localhost:8000@attacker.example", "attacker.example#localhost", "localhost..", "", "[::1", "::1",
           "localhost:port", "127.1", "2130706433"]  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with gateway() as running:
        yield running


def ask(running: Running, *headers: tuple[str, str], target: str = READ, method: str = "GET") -> tuple[int, bytes]:
    """(status, body) of a request whose headers are these and a key, as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", int(running.url.rpartition(":")[2]), timeout=30)
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in (*headers, ("X-API-Key", "tml-local")):
        connection.putheader(name, value)
    connection.endheaders()
    with closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("host", OWN)
def test_it_answers_by_the_names_of_its_machine(running: Running, host: str) -> None:
    assert ask(running, ("Host", host))[0] == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_it_answers_by_no_other_name(running: Running, host: str) -> None:
    status, body = ask(running, ("Host", host))
    assert (status, b'"code":"foreign_site"' in body) == (403, True), body


def test_it_answers_by_exactly_one_name(running: Running) -> None:
    own, foreign = ("Host", "localhost"), ("Host", "attacker.example")
    for hosts in ([own, foreign], [foreign, own], [own, own]):
        assert ask(running, *hosts)[0] in (400, 403), hosts
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"GET /api/v1/get_server_capabilities HTTP/1.0\r\nX-API-Key: tml-local\r\n\r\n")
        assert raw.recv(4096).split()[1] == b"403"


def test_every_route_looks_first_what_name_it_is_called_by(running: Running) -> None:
    """Also those that ask nobody for a key."""
    for target in ("/api/v1/healthz", "/metrics", "/events", "/api/v1/links/x", "/v1/models", "/nowhere"):
        assert ask(running, ("Host", "attacker.example"), target=target)[0] == 403


@pytest.mark.parametrize(
    "origin",
    ["https://attacker.example", "null", "http://localhost:3000", "http://localhost", "", "localhost:8000",
     "http://localhost:8000/", "http://localhost:8000@attacker.example", "file://"],
)  # fmt: skip
def test_pages_of_other_servers_call_nothing(running: Running, origin: str) -> None:
    for target, method in (("/api/v1/jobs", "POST"), (READ, "GET"), ("/api/v1/jobs/x", "DELETE")):
        status, body = ask(running, ("Host", "localhost:8000"), ("Origin", origin), target=target, method=method)
        assert (status, b'"code":"foreign_site"' in body) == (403, True), body


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("LOCALHOST.:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("localhost", "https://localhost:443"),
    ],
)
def test_its_own_pages_may_call(running: Running, host: str, origin: str) -> None:
    assert ask(running, ("Host", host), ("Origin", origin))[0] == 200


def test_the_setting_names_more(running: Running) -> None:
    with gateway(hosts="train.example,[fd00::7],localhost") as named:
        for host in ("train.example", "Train.Example.:8443", "[fd00::7]:8000", "127.0.0.1"):
            assert ask(named, ("Host", host))[0] == 200
        assert ask(named, ("Host", "x.train.example"))[0] == 403
        for origin in (
            "https://train.example",
            "https://train.example:8443",
            "http://localhost:3000",
            "tauri://localhost",
        ):
            assert ask(named, ("Host", "127.0.0.1:8000"), ("Origin", origin))[0] == 200
        assert ask(named, ("Host", "127.0.0.1:8000"), ("Origin", "http://attacker.example"))[0] == 403


@pytest.mark.parametrize("wrong", ["http://train.example", "train.example:80", "a,,b", " a", "*", "a/b"])
def test_what_is_no_name_stops_the_start(wrong: str) -> None:
    with pytest.raises(InvalidField, match=r"KNAPPER_HOSTS is .* allowed: names without ports"):
        Settings.load({"KNAPPER_HOSTS": wrong})


def test_with_keys_names_do_not_matter_as_behind_a_proxy() -> None:
    with gateway(keys=True) as closed:
        for headers in (
            [("Host", "train.example")],
            [("Host", "10.0.0.7:8000"), ("Origin", "https://console.example")],
        ):
            assert ask(closed, *headers)[0] == 401, "it asks for a key, as ever"


def test_a_client_that_names_the_server_as_it_likes_is_told_what_is_allowed(running: Running) -> None:
    answer = httpx.get(f"{running.url}/api/v1/healthz", headers={"Host": "my-laptop.local:8000"})
    assert answer.json()["detail"] == (
        "the header Host is 'my-laptop.local:8000'; allowed without keys: localhost, 127.0.0.1, [::1], and the names "
        "in KNAPPER_HOSTS"
    )


FORMS = ("/signin", "/signout", "/admin/keys", "/playground/chat")  # of the console: they need a token of its pages


def test_no_simple_request_changes_anything_even_if_its_browser_says_nothing(running: Running) -> None:
    """A page may send these to any address without asking; its headers are not its to choose, so there is no key."""
    changing = [(method, path) for method, path in ROUTES if method in ("POST", "PUT", "PATCH", "DELETE")]
    assert len(changing) > 30
    httpx.get(running.url, trust_env=False)  # the first page makes the server's own secret for its cookies
    before = running.run(running.store.list(""))
    with httpx.Client(base_url=running.url, trust_env=False) as page:
        for _, path in changing:
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
                headers = {} if kind is None else {"Content-Type": kind}
                target = re.sub(r"\{[^}]*\}", "x", path)
                answer = page.post(target, content=b'{"files": {"job.yaml": "kind: rl"}}', headers=headers)
                without_its_token = path.startswith(FORMS) and answer.status_code == 422
                assert answer.status_code in (401, 404, 405) or without_its_token, (path, kind, answer.text)
        assert not page.cookies, "none of them has signed anybody in"
    assert running.run(running.store.list("")) == before
