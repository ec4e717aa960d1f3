"""A server with keys, a healthy neighbour beside it, and senders of bodies that are wrong in every way we know."""

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.conformance.server import Server
from tests.engine.tiny import tiny_model
from tests.fuzz.asks import Way, routes
from tests.fuzz.senders import Sender, Sent, new_key
from tests.fuzz.verdict import Answer
from tests.jobs.works import CHAT
from tests.security.test_doors import Objects

SETTINGS = {"KNAPPER_KEYS": "true", "KNAPPER_JWT": "true"}
RESIDENT_BYTES_MAX = 2**30  # of any process of the server, at its highest
GROWTH_BYTES_MAX = 2**28  # of any of them in the second half of a run, in which nothing comes that did not come before
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|^Fatal Python error|\"exception\"", re.MULTILINE)


@dataclass
class Report:
    """What a run found. `peak`: the most that each process held, in bytes."""

    bodies: int = 0
    turns: int = 0
    held: int = 0
    faults: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    by_way: dict[Way, Counter[int]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    resident: list[dict[str, int]] = field(default_factory=list)  # at each tenth of the run


class Neighbour:
    """The healthy client's process: every turn must come out as the first, which nobody disturbed."""

    def __init__(self, url: str, key: str, model: str) -> None:
        command = [sys.executable, "-m", "tests.fuzz.client", url, key, model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: list[dict[str, str]] = []
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not (self._first.wait(120) and self.turns):
            self.__exit__()
            raise AssertionError("the healthy client did not get through its first turn")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.turns.append(json.loads(line))
            self._first.set()
        self._first.set()

    def objects(self) -> Objects:
        """What it has now, for who would like to have it."""
        turn = self.turns[-1]
        session, name = turn["session"], turn["path"].rpartition("/")[2]
        return Objects(session, turn["run"], f"{session}:sample:0", "s-" + "1" * 32, name, "job-theirs")

    def stop(self) -> list[str]:
        """End after the turn under way; return what came out otherwise than in the first."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(300)
        self._thread.join(10)
        differences = [] if code == 0 else [f"the healthy client ended with {code}"]
        for n, turn in enumerate(self.turns):
            differences += [
                f"the healthy client's {name} of turn {n} are other bits than undisturbed"
                for name in ("trained", "sampled", "adapter")
                if turn[name] != self.turns[0][name]
            ]
        return differences


def model(place: Path) -> Path:
    """A tiny model below `place` that can chat."""
    directory = tiny_model(place / "models" / "tiny", context=2048)  # tools in words take a thousand bytes
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


@contextmanager
def served(model: Path, data: Path) -> Iterator[tuple[Server, Neighbour]]:
    """A server with keys and tokens, and the neighbour after its first turn."""
    with Server.start(model, data, settings=SETTINGS) as server:
        with Neighbour(server.url, new_key(data, "alice", 10**9), str(model)) as neighbour:
            yield server, neighbour


def run(model: Path, data: Path, *, seed: int, first: int, count: int, senders: int, out: Path | None = None) -> Report:
    """Send `count` bodies of the seed, from `first` on. `out`: where those are written that were answered wrongly."""
    report, numbers, lock = Report(), itertools.count(), threading.Lock()
    ways = routes()
    with served(model, data) as (server, neighbour):
        waiting, began = iter(range(first, first + count)), time.monotonic()

        def send_all() -> None:
            sender = Sender(server.url, str(model), data, neighbour.objects, numbers)
            while True:
                with lock:
                    n = next(waiting, None)
                if n is None:
                    break
                sent, answer, wrong = sender.send(seed, n, ways)
                with lock:
                    _note(report, seed, sent, answer, wrong, out)
                    if report.bodies % max(count // 10, 1) == 0:
                        _measure(report, server, time.monotonic() - began)
            sender.close()

        with ThreadPoolExecutor(senders) as pool:
            for ended in [pool.submit(send_all) for _ in range(senders)]:
                ended.result()
        report.faults += neighbour.stop()
        report.turns = len(neighbour.turns)
        _measure(report, server, time.monotonic() - began)
        report.faults += _afterwards(server, model, data)
        logged = server.log()
    report.faults += [f"the log has {traceback}" for traceback in tracebacks(logged)]
    report.faults += _greed(report)
    return report


def _note(report: Report, seed: int, sent: Sent, answer: Answer | None, wrong: str | None, out: Path | None) -> None:
    report.bodies += 1
    status = 0 if answer is None else answer.status
    report.statuses[status] += 1
    report.by_way.setdefault(sent.way, Counter())[status] += 1
    report.held += answer is None
    if wrong is None:
        return
    report.faults.append(
        f"body {sent.n}, {' '.join(sent.way)}: {wrong}\n    replay: make fuzz FUZZ_ARGS='--seed {seed} --only {sent.n}'"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
        (out / f"{seed}-{sent.n}.http").write_bytes(f"{sent.way[0]} {sent.url}\r\n{head}\r\n".encode() + sent.body)


def _measure(report: Report, server: Server, seconds: float) -> None:
    """How much each process holds now, and held at its highest."""
    now = {"seconds": int(seconds)}
    for role, pid in server.processes().items():
        try:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue  # an engine that nobody needed has ended
        sizes = {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM") if name in fields}
        now[role] = sizes.get("VmRSS", 0)
        report.peak[role] = max(report.peak.get(role, 0), sizes.get("VmHWM", 0))
    report.resident.append(now)


def _greed(report: Report) -> list[str]:
    held = [
        f"{role} held {size >> 20} MiB; allowed: {RESIDENT_BYTES_MAX >> 20}"
        for role, size in report.peak.items()
        if size > RESIDENT_BYTES_MAX
    ]
    half, last = report.resident[len(report.resident) // 2], report.resident[-1]
    grown = {role: size - half.get(role, size) for role, size in last.items() if role != "seconds"}
    return held + [
        f"{role} grew by {size >> 20} MiB in the second half; allowed: {GROWTH_BYTES_MAX >> 20}"
        for role, size in grown.items()
        if size > GROWTH_BYTES_MAX
    ]


def _afterwards(server: Server, model: Path, data: Path) -> list[str]:
    """Whether it serves as before, a client that is new."""
    try:
        with Neighbour(server.url, new_key(data, "carol", 10**9 + 1), str(model)) as newcomer:
            return newcomer.stop()
    except AssertionError as error:
        return [f"afterwards: {error}"]


def tracebacks(log: str) -> list[str]:
    """Each with its end."""
    return [log[max(0, match.start() - 300) : match.start() + 3000] for match in _TRACEBACK.finditer(log)]
