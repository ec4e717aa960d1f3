"""`knapper demo --events`: put a folder into the inbox, do nothing else, and watch an adapter come out of it."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples.demo import DATA, MODEL, OUT, knapper, show

FOLDER = Path(__file__).parent / "jobs" / "rl"
STEPS = int(re.search(r"^steps: (\d+)$", (FOLDER / "job.yaml").read_text(), re.MULTILINE)[1])  # type: ignore[index]  # it is there
JOB = f"addition-{int(time.time())}"  # a name that no earlier demo had
INBOX, RESULTS = DATA / "inbox" / "local" / JOB, DATA / "jobs" / "local" / JOB
KEPT = OUT / "demo-events"


def read(name: str) -> Any:
    """A result, or None while it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def metrics() -> list[dict[str, Any]]:
    path = RESULTS / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be under way


def follow(began: float) -> list[dict[str, Any]]:
    """Print each step as it comes, until the job has ended."""
    told = 0
    while True:
        status, steps = read("status.json"), metrics()
        for step in steps[told:]:
            show("reward", STEPS, 1.0, began)(step["step"] - 1, step["reward/mean"])
        told = len(steps)
        if status is not None and status["state"] != "running":
            if status["state"] != "completed":
                sys.exit(f"the job is {status['state']}: {status['reason']}")
            return steps
        if (error := INBOX / "job.error.json").exists():
            sys.exit(error.read_text())
        time.sleep(0.5)


def draw(steps: list[dict[str, Any]], evaluation: dict[str, Any], path: Path) -> None:
    held_out = [(0, evaluation["before"]), *((each["step"], each) for each in evaluation["during"])]
    held_out.append((len(steps), evaluation["after"]))
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot([s["step"] for s in steps], [s["reward/mean"] for s in steps], marker="o", color="tab:green")
    axes.plot([n for n, _ in held_out], [each["reward/mean"] for _, each in held_out], marker="s", color="tab:blue")
    axes.set(title="Addition, with no client running", xlabel="step", ylabel="mean reward", ylim=(-0.02, 1.02))
    axes.legend(["training prompts, sampled", "held-out prompts, greedy"])
    figure.savefig(path, dpi=120)


def run() -> None:
    began = time.monotonic()
    print(f"\nCopying {FOLDER.name}/ (job.yaml, prompts, held-out prompts) to {INBOX}; nothing else is done.\n")
    shutil.copytree(FOLDER, INBOX)
    steps = follow(began)
    evaluation, bill = read("evaluation.json"), read("bill.json")
    draw(steps, evaluation, OUT / "demo-events.png")
    before, after = evaluation["before"]["reward/mean"], evaluation["after"]["reward/mean"]
    print(f"\nheld-out sums, right before -> after training: {before:.0%} -> {after:.0%}")
    shutil.rmtree(KEPT, ignore_errors=True)
    shutil.copytree(RESULTS, KEPT)
    print(f"adapter: {KEPT / 'adapter'}, {bill['bytes']['adapter'] / 1e6:.1f} MB")
    seconds, tokens = bill["wall_seconds"], bill["tokens"]
    print(f"bill: {tokens['sampled']} tokens sampled, {tokens['trained']} trained; busy {seconds['busy']:.0f} s, "
          f"idle {seconds['idle']:.0f} s")  # fmt: skip
    figures = {"steps": steps, "evaluation": evaluation, "bill": bill, "seconds": time.monotonic() - began}
    (OUT / "demo-events.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\n{figures['seconds']:.0f} s; the curve is in {OUT / 'demo-events.png'}")


def main(model: str = MODEL) -> None:
    OUT.mkdir(exist_ok=True)
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    try:
        with knapper(model):
            run()
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
