"""Time saved by `max_staleness`: the same rl job with 0 and with 1, each function in a process of its own.

Seconds a step, from the bill's wall clock; jobs of both kinds alternate. With a core for each computing process, step
k+1 is sampled while step k trains; on one device they take turns, and only the time between them overlaps.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, Pair, faster
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

STEPS, REPEATS = 12, 3
JOB = """\
kind: rl
data: p.jsonl
steps: {steps}
batch: {{prompts: 8, samples: 8}}
sampling: {{max_tokens: 64}}
reward: {{name: length, max: 10, slope: 200}}
max_staleness: {staleness}
"""
PROMPTS = "".join(json.dumps({"prompt": f"Tell me {n} times what the sea is like."}) + "\n" for n in range(16))


def measured(repeats: int = REPEATS) -> dict[str, float]:
    """Seconds a step, the median of the repeats, by max_staleness."""
    seconds_by_staleness: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory(prefix="knapper-bench-") as scratch:
        model = tiny_model(Path(scratch) / "model")
        with Server.start(model, Path(scratch) / "data", "--isolated", dtype="float32") as server:
            _run(server, 0, "warm-up")
            for repeat in range(repeats):
                for staleness, seconds in seconds_by_staleness.items():
                    seconds.append(_run(server, staleness, f"job-{staleness}-{repeat}"))
    return {
        f"max_staleness {staleness}": statistics.median(seconds) for staleness, seconds in seconds_by_staleness.items()
    }


def figures(repeats: int = REPEATS) -> list[Figure]:
    """Figures of both."""
    without, with_ = measured(repeats).values()
    name = "an rl job, tiny model: seconds a step with max_staleness 1, against 0"
    return [faster("jobs", name, Pair(with_, without, None))]


def _run(server: Server, staleness: int, job: str) -> float:
    inbox, results = server.data / "inbox" / "local" / job, server.data / "jobs" / "local" / job
    inbox.mkdir(parents=True)
    (inbox / "p.jsonl").write_text(PROMPTS)
    (inbox / "job.yaml").write_text(JOB.format(steps=STEPS, staleness=staleness))
    status = results / "status.json"
    while not status.exists() or json.loads(status.read_text())["state"] == "running":
        time.sleep(0.05)
    assert json.loads(status.read_text())["state"] == "completed", status.read_text()
    wall: float = json.loads((results / "bill.json").read_text())["wall_seconds"]["whole"]
    return wall / STEPS
