"""Sweeps of the tests: a small job, its sections, and the table that one comes to."""

import json
from functools import cache
from typing import Any

from knapper.jobs import control
from knapper.jobs.names import Start
from tests.jobs.services import lines
from tests.jobs.works import House, Malice, Works, run

ROWS = lines(*({"prompt": f"{word} and", "completion": f" {word}"} for word in ("in", "on", "her", "an")))
BASE = """\
kind: sft
data: p.jsonl
steps: 2
batch: {sequences: 2}
lora: {rank: 2}
optimizer: {learning_rate: 0.01}
evaluate: {data: e.jsonl}
"""
CALM = Malice()
SMALL = "sweep: {over: {lora.rank: [2, 4]}, at_once: 1}\n"
GRID = "sweep: {over: {optimizer.learning_rate: [0.001, 0.03], lora.rank: [2, 4]}, at_once: 2}\n"
SEARCH = """\
sweep:
  method: tpe
  over:
    optimizer.learning_rate: {low: 0.0001, high: 0.1, log: true}
    lora.rank: {low: 2, high: 6, step: 2}
    optimizer.schedule: [constant, linear]
  budget: {trials: 5}
  at_once: %d
  seed: 7
"""


def files(section: str, base: str = BASE) -> dict[str, str]:
    return {"job.yaml": base + section, "p.jsonl": ROWS, "e.jsonl": ROWS}


async def ended(works: Works, section: str, base: str = BASE) -> Start:
    begun = await works.submit(files(section, base))
    await works.run(begun)
    await works.drain()
    return begun


async def swept(house: House, section: str, seed: int = 0, malice: Malice = CALM, base: str = BASE) -> Works:
    """A sweep that has come to its end, whatever was lost, doubled and killed."""
    works = Works(house, seed, malice, slice_s=0.05 if malice.kill else 30.0)
    begun = await ended(works, section, base)
    state = await control.now(works.store, begun)
    assert state.state == "completed", state
    return works


@cache
def calm(house: House, section: str) -> Works:
    """The same with nothing lost."""
    works: Works = run(lambda: swept(house, section))
    return works


def table(works: Works, job: str = "j") -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(works.output("sweep.json", job))
    return shown


def comparable(works: Works) -> list[tuple[Any, ...]]:
    """The rows without their device seconds, which no two runs share."""
    return [(row["job"], row["values"], row["state"], row["value"], row["step"]) for row in table(works)["trials"]]
