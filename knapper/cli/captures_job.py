"""Captured episodes as the folder of a job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from knapper.cli.captures_client import CapturesClient
from knapper.errors import UserError
from knapper.jobs import captured

_DATA: Final = "episodes.jsonl"


def write(
    client: CapturesClient, folder: Path, groups: Sequence[str], *, epochs: int, learning_rate: float, rank: int
) -> str:
    """Write job.yaml and its data; return what they are, for people. `groups`: only of these; empty: all episodes.

    Raises UserError if no episode is scored, or if they are of several base models.
    """
    listed = [each for each in client.episodes() if not groups or each["group"] in groups]
    scored = [each for each in listed if each["score"] is not None]
    if not scored:
        allowed = "at least one, by `knapper capture score EPISODE SCORE`"
        raise UserError(f"none of {len(listed)} episodes has a score; allowed: {allowed}")
    models: set[str] = set()
    weights: set[str] = set()
    tokens = 0
    with (folder / _DATA).open("wb") as data:
        for each in scored:
            episode = client.episode(each["episode"])
            models |= {turn["base_model"] for turn in episode["turns"]}
            weights |= {turn["weights"]["digest"] or "base" for turn in episode["turns"]}
            row = _row(episode)
            tokens += sum(len(sequence["logprobs"]) for sequence in row["sequences"])
            data.write(msgspec.json.encode(row) + b"\n")
    if len(models) > 1:
        shown = ", ".join(sorted(models))
        raise UserError(f"the episodes are of {len(models)} base models, {shown}; allowed: of one; choose by --group")
    job = {
        "kind": "episodes",
        "base_model": models.pop(),
        "data": _DATA,
        "epochs": epochs,
        "lora": {"rank": rank},
        "optimizer": {"learning_rate": learning_rate},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    unscored = len(listed) - len(scored)
    left_out = f"; {unscored} without a score are left out" if unscored else ""
    versions = f"drawn by {len(weights)} versions of the weights"
    return f"{len(scored)} episodes with {tokens} sampled tokens, {versions}{left_out}"


def _row(episode: dict[str, Any]) -> dict[str, Any]:
    sequences = captured.joined(captured.answers(episode["turns"]))
    return {
        "episode": episode["episode"], "group": episode["group"] or "", "reward": episode["score"],
        "sequences": [
            {"tokens": each.tokens, "sampled": each.sampled, "logprobs": each.logprobs} for each in sequences
        ],
    }  # fmt: skip
