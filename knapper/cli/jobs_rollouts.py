"""Rollouts of a job as it publishes them, read from a server: which file is wanted, and its rows for people."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from knapper.cli.tables import table
from knapper.errors import NotFound
from knapper.jobs import names

if TYPE_CHECKING:
    from knapper.cli.jobs_client import JobsClient

_NAME: Final = re.compile(r"rollouts/(step|evaluation)-(\d+)\.jsonl")
_SHOWN_CHARS: Final = 60


def read(client: "JobsClient", job: str, step: int | None, evaluation: int | None) -> list[dict[str, Any]]:
    """Of the step, of the evaluation, or of the newest step. Raises NotFound, saying which there are."""
    found = [match for file in client.files(job) if (match := _NAME.fullmatch(file["name"]))]
    kind, wanted = ("step", step) if evaluation is None else ("evaluation", evaluation)
    there = sorted(int(match[2]) for match in found if match[1] == kind)
    n = wanted if wanted is not None else there[-1] if there else None
    if n not in there:
        which = f"{there[0]} to {there[-1]}" if there else "none; only jobs of kind rl have any, once a step is done"
        raise NotFound(f"job {job} has no rollouts of {kind} {'1' if n is None else n}; there are {which}")
    with client.stream(f"/jobs/{names.job(job)}/files/{quote(f'rollouts/{kind}-{n}.jsonl')}", {}) as answer:
        return [json.loads(line) for line in answer.read().split(b"\n") if line]  # texts have other ends of lines


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a rollout; texts are cut."""
    if rows:
        yield from table(("REWARD", "ADVANTAGE", "TOKENS", "PROMPT", "COMPLETION"), [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1].get("content", "")
    reward = "refused" if "refused" in row else f"{row['reward']:.4g}"
    advantage = f"{row['advantage']:+.3f}" if "advantage" in row else "-"
    return reward, advantage, str(row["tokens"]), _cut(prompt), _cut(row["completion"])


def _cut(text: object) -> str:
    shown = text if isinstance(text, str) else json.dumps(text)
    return shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 3] + "..."
