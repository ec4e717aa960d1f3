"""On one machine every port that a `knapper up` opens, but the gateway's, is closed to whoever has no key of its own.

To other accounts, and to a page in a browser of this one: it cannot know the key, whatever requests it sends.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.local.broker.watcher import finalized
from knapper.store.directory import DirectoryStore
from tests.conformance.kill_client import datum
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model
from tests.state.accounts import as_other, opened

_LISTEN = "0A"  # <net/tcp_states.h>
REWARD: dict[str, Any] = {
    "reward": {"code": "reward.py"},
    "rollouts": [{"id": "a", "completion": "7", "answer": 7}],
    "files": {"reward.py": "def reward(prompt, completion, answer):\n    return 0.5\n"},
}
BELLS = [
    Event(type=cloudevents.OPERATIONS, subject="ses-" + "0" * 32 + ":train:0", id="1"),
    Event(type=cloudevents.JOB_STARTED, subject="local/adding/0123456789abcdef", id="2", kind="sft"),
    Event(type=cloudevents.ROLLOUTS_SAMPLED, subject="local/adding/0123456789abcdef", id="3", step=0, kind="rl"),
]


@pytest.fixture(scope="module", params=["shared", "isolated"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Every function of it runs."""
    directory = tmp_path_factory.mktemp("doors")
    model = tiny_model(directory / "model")
    flags = ["--isolated"] if request.param == "isolated" else []
    with Server.start(model, directory / "data", *flags) as server:
        with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
            training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
            training.forward_backward([datum(1)], "cross_entropy").result()
            sampler = service.create_sampling_client(base_model=str(model)).result()
            sampler.sample(tinker.ModelInput.from_ints([1, 2]), 1, tinker.SamplingParams(max_tokens=1)).result()
        scored = httpx.post(f"{server.url}/api/v1/rewards", json=REWARD, headers={"X-API-Key": "tml-local"}, timeout=60)
        assert scored.json()["scores"][0]["value"] == 0.5
        yield server
        assert "Traceback" not in server.log(), server.log()[-4000:]


def sockets(pid: int) -> Iterator[str]:
    """What the process has open, while it opens and closes; nothing of one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # closed since
                yield descriptor.readlink().name


def listening(server: Server) -> set[int]:
    """Ports on which any process of the server listens, as the kernel says."""
    inodes = {name for role in server.processes() for pid in server.members(role) for name in sockets(pid)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in inodes:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def door(ports: dict[str, int], function: str) -> str:
    """Where the function listens, in a process of its own or in the engines'."""
    return f"http://127.0.0.1:{ports.get(function) or ports['engine']}/{function}/"


def strangers(base: str) -> Iterator[httpx.Request]:
    """Whatever somebody without the key may send."""
    for path in (
        "/",
        "/reward",
        "/train_step",
        "/sample",
        "/train_step/",
        "/sample/",
        "/reward/",
        "/shared",
    ):
        url = base + path
        yield httpx.Request("POST", url, content=json.dumps(REWARD), headers={"Content-Type": "text/plain"})
        yield httpx.Request(
            "POST", url, json=REWARD, headers={"Authorization": "Bearer tml-local", "X-API-Key": "tml-local"}
        )
        yield httpx.Request("PUT", url, json=REWARD)
        for event in BELLS:
            headers, body = event.encode()
            yield httpx.Request("POST", url, headers=headers, content=body)
            attributes = {name.removeprefix("ce-"): value for name, value in headers.items() if name.startswith("ce-")}
            structured = {"Content-Type": "application/cloudevents+json"}
            yield httpx.Request("POST", url, json=attributes, headers=structured)
    for name in ("train_step", "sample", "reward"):
        yield httpx.Request("GET", f"{base}/{name}")


def test_every_port_but_the_gateways_refuses_whoever_has_no_key(server: Server) -> None:
    ports = server.ports()
    inner = {role: port for role, port in ports.items() if role != "gateway"}
    assert {"broker", "reward"} < set(inner)
    assert listening(server) == set(ports.values()), "there is no port that this test does not know"
    for role, port in inner.items():
        with httpx.Client(trust_env=False, timeout=30) as client:
            for request in strangers(f"http://127.0.0.1:{port}"):
                answer = client.send(request, follow_redirects=True)
                assert answer.status_code in (400, 401, 404, 405), (role, request.method, request.url, answer.text)
                assert answer.status_code == 401 or not answer.content.startswith(b'{"scores"')
    # Where each one's own door is, it is the key that is missing.
    with httpx.Client(trust_env=False, timeout=30) as client:
        for name in ("train_step", "sample", "reward"):
            refused = client.post(door(ports, name), json=REWARD)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        headers, body = BELLS[1].encode()
        refused = client.post(f"http://127.0.0.1:{inner['broker']}/", headers=headers, content=body)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")


def test_with_the_key_of_the_store_the_same_calls_are_answered(server: Server) -> None:
    """Or the test above would only see that nothing works."""
    key = FunctionKey(DirectoryStore(server.data / "store"))
    opening, signed = asyncio.run(key.headers()), asyncio.run(key.sign(BELLS[1])).encode()
    ports = server.ports()
    with httpx.Client(trust_env=False, timeout=30) as client:
        scored = client.post(door(ports, "reward"), json=REWARD, headers=opening)
        assert scored.json()["scores"][0]["value"] == 0.5
        for name in ("train_step", "sample"):
            assert client.post(door(ports, name), json={}, headers=opening).status_code in (400, 422)
        taken = client.post(f"http://127.0.0.1:{ports['broker']}/", headers=signed[0], content=signed[1])
        assert taken.status_code == 202
        headers, body = finalized("inbox/local/none/job.yaml", "1", 1, 0.0).encode()
        taken = client.post(f"http://127.0.0.1:{ports['broker']}/", headers=headers, content=body)
        assert taken.status_code == 202, "of storage: the gateway looks into the inbox, and believes nothing"


def test_another_account_of_the_machine_has_no_way_to_the_functions(server: Server) -> None:
    """It may connect; it can read neither the key nor the tokens' secret."""
    opened(server.data)
    for name in ("secrets/functions", "secrets/links"):
        done = as_other("sys.stdout.write(open(sys.argv[1]).read())", str(server.data / "store" / name))
        assert (done.stdout, "PermissionError" in done.stderr) == ("", True)
    call = "r = urllib.request.Request(sys.argv[1], sys.argv[2].encode()); print(urllib.request.urlopen(r).read())"
    url = door(server.ports(), "reward")
    done = as_other(call, url, json.dumps(REWARD), first="import encodings.idna, urllib.request")
    assert "HTTP Error 401" in done.stderr, done
    for pid in server.processes().values():  # nor where the key may stand in memory
        done = as_other("sys.stdout.write(open(sys.argv[1]).read())", f"/proc/{pid}/environ")
        assert "PermissionError" in done.stderr


def test_what_the_processes_write_is_for_their_account_alone(server: Server) -> None:
    for role, pid in server.processes().items():
        (mask,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Umask"))
        assert mask.split()[1] == "0077", role
    inbox = server.data / "inbox"
    open_ones = [str(path) for path in (server.data, *server.data.rglob("*")) if path.lstat().st_mode & 0o077]
    assert [path for path in open_ones if not path.startswith(str(inbox))] == []
