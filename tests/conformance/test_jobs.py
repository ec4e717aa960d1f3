"""Jobs on a tiny model, through real processes: an upload ends with the same adapter, whatever happens on the way."""

import asyncio
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.state import dead_letters
from knapper.store.directory import DirectoryStore
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model
from tests.jobs.works import CHAT

EXAMPLES = Path(__file__).parents[2] / "examples" / "jobs"
KINDS = ("rl", "sft", "dpo", "environment")
# What makes the examples small, and what lets a tiny random model's completions differ in their worth.
CHANGES = {
    "rl": [
        ("steps: 16", "steps: 3"),
        ("{prompts: 8, samples: 8}", "{prompts: 2, samples: 4}"),
        ("{max_tokens: 3,", "{max_tokens: 24, temperature: 2.0,"),
        ("{name: exact_match}", "{name: length, max: 10, slope: 60}"),
        ("every: 4", "every: 2"),
    ],
    "environment": [
        ("steps: 12", "steps: 2"),
        ("{prompts: 8, samples: 8}", "{prompts: 2, samples: 4}"),
        ("{max_tokens: 8}", "{max_tokens: 12, temperature: 2.0}"),
        ("turns: 4", "turns: 2"),
        ("every: 4", "every: 2"),
    ],
    "sft": [("epochs: 15", "epochs: 4"), ("every: 5", "every: 2")],
    "dpo": [("epochs: 5", "epochs: 2")],
}
ENDED_S_MAX = 110.0


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    directory = tiny_model(tmp_path_factory.mktemp("chatting") / "tiny")
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def upload(server: Server) -> None:
    """Copy the examples into the inbox, as anybody would, job.yaml first; nothing else."""
    for kind in KINDS:
        inbox = server.data / "inbox" / "local" / kind
        inbox.mkdir(parents=True)
        yaml = (EXAMPLES / kind / "job.yaml").read_text()
        for old, new in CHANGES[kind]:
            assert old in yaml, old
            yaml = yaml.replace(old, new)
        (inbox / "job.yaml").write_text(yaml)
        for file in (EXAMPLES / kind).iterdir():
            if file.suffix in (".jsonl", ".py"):
                shutil.copy(file, inbox)


def ended(server: Server, beside: Iterator[object]) -> None:
    """Wait until all jobs have ended, and do what is to be done beside it."""
    until = time.monotonic() + ENDED_S_MAX
    waiting = set(KINDS)
    while waiting:
        next(beside, None)
        for kind in list(waiting):
            path = server.data / "jobs" / "local" / kind / "status.json"
            status = json.loads(path.read_text()) if path.exists() else {"state": "running"}
            if status["state"] != "running":
                assert status["state"] == "completed", status
                waiting.discard(kind)
        assert time.monotonic() < until, f"{waiting} did not end:\n{server.log()[-6000:]}"
        time.sleep(0.2)


def results(server: Server) -> dict[str, bytes]:
    """What has to be the same: adapters, evaluations, rollouts."""
    found = {}
    for kind in KINDS:
        folder = server.data / "jobs" / "local" / kind
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "evaluation.json"):
            found[f"{kind}/{name}"] = (folder / name).read_bytes()
        for path in sorted(folder.glob("rollouts/*.jsonl")):
            found[f"{kind}/{path.name}"] = path.read_bytes()
    return found


def metrics(server: Server, kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.data / "jobs/local" / kind / "metrics.jsonl").read_text().splitlines()]


def poison() -> list[Event]:
    """Well-formed events that name no job: each goes to a function, which says so."""
    subjects = ("nonsense", "local/none/0123456789abcdef", "../../etc/passwd", "local/rl", "")
    types = (
        cloudevents.ROLLOUTS_SAMPLED,
        cloudevents.ROLLOUTS_SCORED,
        cloudevents.JOB_STARTED,
        cloudevents.ADAPTER_STEPPED,
    )
    return [
        Event(type=types[n % len(types)], subject=subject, id=f"poison-{n}", kind="rl" if n % 2 else "sft")
        for n, subject in enumerate(subjects * 2)
        if subject
    ]


def post(server: Server, sent: list[Event]) -> Iterator[None]:
    """Each several times over, since the Broker loses some; and things that are no events, which it refuses."""
    port = json.loads((server.data / "run" / "processes.json").read_text())["broker"]["port"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        key = FunctionKey(DirectoryStore(server.data / "store"))
        for event in sent:
            headers, body = asyncio.run(key.sign(event)).encode()
            for _ in range(6):
                assert client.post("/", headers=headers, content=body).status_code == 202
            assert client.post("/", content=b"{]").status_code == 400
            yield


@pytest.mark.timeout(180)
def test_uploads_end_with_the_same_adapters_whatever_is_lost_doubled_or_killed(chatting: Path, tmp_path: Path) -> None:
    with Server.start(chatting, tmp_path / "calm") as calm:
        upload(calm)
        ended(calm, iter(()))
        wanted = results(calm)
        assert "Traceback" not in calm.log(), calm.log()[-4000:]
    sent = poison()
    settings = {"KNAPPER_FAULT_INJECTION_SEED": "7", "KNAPPER_JOB_STALLED_S": "1"}
    with Server.start(chatting, tmp_path / "wild", settings=settings) as wild:
        upload(wild)
        dead_pids: list[int] = []
        ended(wild, itertools.chain(post(wild, sent), killed(wild, dead_pids)))
        assert len(dead_pids) >= 3, "the jobs were at work while their processes were killed"
        assert results(wild) == wanted
        assert "Traceback" not in wild.log(), wild.log()[-4000:]
        letters = _letters(wild, {event.id for event in sent})
    assert letters == {event.id for event in sent}, "the dead letters are exactly the poison"
    assert all("grad_norm" in step for kind in KINDS for step in metrics(wild, kind)), "every step trains"
    assert [step["staleness"] for step in metrics(wild, "rl")] == [0, 1, 1]
    losses = [step["loss/mean"] for step in metrics(wild, "sft")]
    assert losses[-1] < losses[0]


def killed(server: Server, pids: list[int]) -> Iterator[None]:
    """kill -9 of who computes, three times, and of the gateway; the broker remembers nothing, and is let be."""
    for role in ("engine", "gateway", "engine", "engine"):
        if role in server.processes():
            pids.append(server.kill(role))
        for _ in range(8):
            yield


def _letters(server: Server, expected: set[str]) -> set[str]:
    """Ids of the dead letters, once those that are expected have come."""
    import asyncio

    store = DirectoryStore(server.data / "store")
    until = time.monotonic() + 20
    while True:
        found = {letter.attributes["id"] for letter in asyncio.run(dead_letters.listed(store))}
        if found >= expected or time.monotonic() > until:
            return found
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_of_five_hundred_steps_runs_through_a_broker_that_ends_chains_of_replies_after_255(
    chatting: Path, tmp_path: Path
) -> None:
    """Each step is three events and more, every one posted and none of them a reply."""
    yaml = (
        "kind: rl\ndata: p.jsonl\nsteps: 500\nlora: {rank: 2}\nbatch: {prompts: 1, samples: 2}\n"
        "sampling: {max_tokens: 2}\nreward: {name: length, max: 1, slope: 3}\n"
    )
    with Server.start(chatting, tmp_path / "data", settings={"KNAPPER_JOB_STALLED_S": "600"}) as server:
        inbox, results = (server.data / part / "local" / "long" for part in ("inbox", "jobs"))
        inbox.mkdir(parents=True)
        (inbox / "p.jsonl").write_text('{"prompt": "and the"}\n')
        (inbox / "job.yaml").write_text(yaml)
        until, status = time.monotonic() + 800, results / "status.json"
        while not status.exists() or json.loads(status.read_text())["state"] == "running":
            assert time.monotonic() < until, server.log()[-4000:]
            time.sleep(1)
        assert json.loads(status.read_text())["state"] == "completed", status.read_text()
        assert len((results / "metrics.jsonl").read_text().splitlines()) == 500
        assert "its event is sent again" not in server.log(), "no bell was lost, and no tick had to help"
        assert asyncio.run(dead_letters.listed(DirectoryStore(server.data / "store"))) == []
