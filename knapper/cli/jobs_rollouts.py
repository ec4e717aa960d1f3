"""Reads the rollouts that a job has published from a server, and prints them."""

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
    """Rollouts of the step, of the evaluation, or of the newest step. Raises NotFound, naming those that exist."""
    matches = [match for file in client.files(job) if (match := _NAME.fullmatch(file["name"]))]
    kind, wanted = ("step", step) if evaluation is None else ("evaluation", evaluation)
    numbers = sorted(int(match[2]) for match in matches if match[1] == kind)
    n = wanted if wanted is not None else numbers[-1] if numbers else None
    if n not in numbers:
        which = (
            f"{numbers[0]} to {numbers[-1]}" if numbers else "none; only jobs of kind rl have any, once a step is done"
        )
        raise NotFound(f"job {job} has no rollouts of {kind} {'1' if n is None else n}; there are {which}")
    with client.stream(f"/jobs/{names.job(job)}/files/{quote(f'rollouts/{kind}-{n}.jsonl')}", {}) as answer:
        return [json.loads(line) for line in answer.read().split(b"\n") if line]  # texts may contain other line ends


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line per rollout; texts are shortened."""
    if not rows:
        return
    if any("turns" in row for row in rows):
        heads = ("REWARD", "ADVANTAGE", "TOKENS", "TURNS", "ENDED", "PROMPT", "COMPLETIONS")
        yield from table(heads, [_episode(row) for row in rows])
    else:
        yield from table(("REWARD", "ADVANTAGE", "TOKENS", "PROMPT", "COMPLETION"), [_line(row) for row in rows])


def _episode(row: dict[str, Any]) -> tuple[str, ...]:
    """A rollout of several turns."""
    reward, advantage, tokens, prompt, completion = _line(row)
    turns = row.get("turns", [])
    said = " | ".join(turn["completion"] for turn in turns) if turns else completion
    return reward, advantage, tokens, str(len(turns)), row.get("ended") or "-", prompt, _cut(said)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1].get("content", "")
    reward = "refused" if "refused" in row else f"{row['reward']:.4g}"
    advantage = f"{row['advantage']:+.3f}" if "advantage" in row else "-"
    return reward, advantage, str(row["tokens"]), _cut(prompt), _cut(row["completion"])


def _cut(text: object) -> str:
    shown = text if isinstance(text, str) else json.dumps(text)
    return shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 3] + "..."
