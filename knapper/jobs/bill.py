"""What a job used: tokens, device seconds, wall-clock seconds with and without work, bytes."""

from collections.abc import Sequence
from typing import Any

from knapper.jobs.job_files import Folder
from knapper.state.job_records import Evaluated, Trained
from knapper.state.prices import Prices

Interval = tuple[float, float]


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same times, in order and without overlaps."""
    merged: list[Interval] = []
    for began, ended in sorted(intervals):
        if merged and began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


def covered(intervals: Sequence[Interval]) -> float:
    return sum(ended - began for began, ended in union(intervals))


def bill(
    folder: Folder,
    done: Sequence[Trained | Evaluated],
    saving_s: float,
    adapter_bytes: int,
    now: float,
    prices: Prices,
) -> dict[str, Any]:
    """The bill of a whole job. `saving_s`: device seconds of its last saves.

    `cost` is null without prices; keeping the adapter costs `stored_a_month` beyond it. `device_seconds` are those of
    `knapper usage`. With `max_staleness`, `wall_seconds` of the functions overlap; during `idle` none of them worked.
    """
    spent = [each.spent for each in done]
    wall_s = now - folder.started.started_at
    working = [(each.began_at, each.ended_at) for each in done]
    busy_s = covered([*working, *((began, ended) for each in spent for began, ended in each.busy)])
    return {
        "tokens": {
            "prompts": sum(each.prompt_tokens for each in spent),
            "sampled": sum(each.sampled_tokens for each in spent),
            "trained": sum(each.tokens for each in done),
        },
        "device_seconds": {
            "sample": round(sum(each.sample_device_s for each in spent), 3),
            "train_step": round(saving_s + sum(each.device_s for each in done), 3),
        },
        "wall_seconds": {
            "sample": round(sum(each.sample_s for each in spent), 3),
            "reward": round(sum(each.reward_s for each in spent), 3),
            "train_step": round(sum(ended - began for began, ended in working), 3),
            "busy": round(busy_s, 3),
            "idle": round(max(0.0, wall_s - busy_s), 3),
            "whole": round(wall_s, 3),
        },
        "bytes": {
            "uploaded": folder.started.files_bytes,
            "rollouts": sum(each.bytes for each in spent),
            "journal": sum(each.bytes for each in done),
            "adapter": adapter_bytes,
        },
        "cost": _cost(done, saving_s, adapter_bytes, prices) if prices.any else None,
    }


def _cost(
    done: Sequence[Trained | Evaluated], saving_s: float, adapter_bytes: int, prices: Prices
) -> dict[str, float | str]:
    """What `knapper usage` adds up to for this job."""
    spent = [each.spent for each in done]
    training = prices.cost(
        trained=sum(each.tokens for each in done), device_s=saving_s + sum(each.device_s for each in done)
    )
    sampling = prices.cost(
        prefilled=sum(each.prompt_tokens for each in spent),
        sampled=sum(each.sampled_tokens for each in spent),
        device_s=sum(each.sample_device_s for each in spent),
    )
    return {
        "currency": prices.currency, "training": training, "sampling": sampling, "total": training + sampling,
        "stored_a_month": prices.a_month(adapter_bytes),
    }  # fmt: skip
