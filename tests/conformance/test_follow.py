"""`--follow` through real processes: from before the job is there, through the end of its server, to the job's end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conformance.server import Server, wait_until
from tests.engine.tiny import tiny_model
from tests.jobs.works import CHAT

PROMPTS = "".join(json.dumps({"prompt": f"the {n} and"}) + "\n" for n in range(6))
JOB = """\
kind: rl
data: p.jsonl
steps: 6
batch: {prompts: 4, samples: 8}
sampling: {max_tokens: 24}
lora: {rank: 4}
reward: {name: length, max: 10, slope: 60}
evaluate: {data: p.jsonl}
"""


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_model(tmp_path_factory.mktemp("chatting") / "tiny")
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def folder(where: Path, yaml: str = JOB) -> Path:
    where.mkdir(parents=True)
    (where / "p.jsonl").write_text(PROMPTS)
    (where / "job.yaml").write_text(yaml)
    return where


class Following:
    """A `knapper ...` under way, and what it printed so far."""

    def __init__(self, process: "subprocess.Popen[bytes]", path: Path) -> None:
        self.process, self._path = process, path

    def said(self) -> str:
        return self._path.read_text()

    def ended(self, timeout_s: float = 90.0) -> int:
        return self.process.wait(timeout_s)


@contextmanager
def following(server: Server, tmp_path: Path, *arguments: str) -> Iterator[Following]:
    path = tmp_path / "followed.log"
    environ = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "knapper", *arguments], stdout=log, stderr=subprocess.STDOUT, env=environ
        )
    try:
        yield Following(process, path)
    finally:
        process.kill()
        process.wait()


@contextmanager
def tailing(path: Path, tmp_path: Path) -> Iterator[Path]:
    """What `tail -F` prints of the file, which may not be there yet."""
    printed = tmp_path / "tailed.log"
    with printed.open("wb") as log:
        process = subprocess.Popen(["tail", "-n", "+1", "-F", str(path)], stdout=log, stderr=subprocess.DEVNULL)
    try:
        yield printed
    finally:
        process.kill()
        process.wait()


def steps(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"step +(\d+)/6  reward", text)]


def told(log: str) -> list[str]:
    """Its lines, sorted, without times, figures and fields; that files were awaited depends on how they came."""
    lines = [re.sub(r"( [\d.]+ s)?( \w+=.*)?$", "", line[17:]) for line in log.splitlines()]
    return sorted(line for line in lines if "job waits for files" not in line)


@pytest.mark.timeout(180)
def test_a_follower_goes_on_through_a_server_that_is_killed_and_started_again(chatting: Path, tmp_path: Path) -> None:
    yaml = folder(tmp_path / "job") / "job.yaml"
    with Server.start(chatting, tmp_path / "data", settings={"KNAPPER_JOB_STALLED_S": "600"}) as server:
        published = server.data / "jobs/local/job/metrics.jsonl"
        with (
            tailing(published, tmp_path) as tailed,
            following(server, tmp_path, "submit", str(yaml), "--follow") as follower,
        ):
            wait_until(lambda: published.exists() and bool(published.read_text()), "a step is published", 60)
            for pid in server.members("engine"):
                os.kill(pid, signal.SIGSTOP)  # or a fast machine ends the job before the follower looks again
            wait_until(lambda: bool(steps(follower.said())), "a step is printed")
            assert max(steps(follower.said())) < 6, "the job has not ended"
            server.kill()
            wait_until(lambda: "waiting for it" in follower.said(), "the follower waits")
            server.up()
            assert follower.ended() == 0, follower.said()
            metrics = published.read_text()
            wait_until(lambda: len(tailed.read_text()) >= len(metrics), "tail has printed the rest")
            assert tailed.read_text() == metrics, "each line once"
        said = follower.said()
    assert steps(said) == [1, 2, 3, 4, 5, 6], said
    assert "the server answers again" in said
    assert re.search(r"^job: completed, step 6/6, \d+:\d\d$", said, re.MULTILINE), said
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.timeout(180)
def test_a_job_that_is_not_there_yet_is_waited_for_and_its_cold_start_is_told(chatting: Path, tmp_path: Path) -> None:
    with Server.start(chatting, tmp_path / "data") as server:
        with following(server, tmp_path, "jobs", "show", "soon", "--follow") as follower:
            wait_until(lambda: "there is no job 'soon' yet" in follower.said(), "it says that it waits")
            shutil.copytree(folder(tmp_path / "soon"), server.data / "inbox" / "local" / "soon")
            assert follower.ended() == 0, follower.said()
        log = server.log()
    said = follower.said()
    assert told(log) == [
        "engine: job completed", "engine: loaded", "engine: memory", "gateway: job started",
        "up: engine: ready after", "up: engine: starting", "up: reward: ready after", "up: reward: starting",
    ], log  # fmt: skip
    assert re.search(r"^ +\d:\d\d  (waiting for the engine|loading the model), for \d:\d\d$", said, re.MULTILINE), said
    assert steps(said) == [1, 2, 3, 4, 5, 6], said
    first = said.index("reward/mean")
    assert re.search(r"ends in about \d+:\d\d$", said[first:], re.MULTILINE), said


@pytest.mark.timeout(120)
def test_a_follower_ends_with_the_job_s_failure(chatting: Path, tmp_path: Path) -> None:
    long = folder(tmp_path / "job", JOB.replace("max_tokens: 24", "max_tokens: 100000"))
    with Server.start(chatting, tmp_path / "data") as server:
        with following(server, tmp_path, "submit", str(long / "job.yaml"), "--follow") as follower:
            assert follower.ended() == 1, follower.said()
    assert "job: failed, step 0/6" in follower.said()


def test_a_server_that_never_answered_is_not_waited_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "knapper", "jobs", "show", "j", "--follow", "--url", "http://127.0.0.1:9"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "does not answer" in done.stderr
