"""A job's samples for `knapper usage`: by the minute, each exactly once, in spite of repetitions and kills.

The cost of a step's samples is carried from record to record (`Trained.uncounted`) until a minute is over; then it is
written under a name and with content that a repetition would produce again.
"""

import hashlib
from typing import Final

from knapper.jobs.job_files import Folder
from knapper.state.job_records import Spent, Trained, Uncounted, read
from knapper.state.journal.records import encode
from knapper.state.usage import HOUR_S, Sampled, Samplings, record_name
from knapper.store import Store

_MINUTE_S: Final = 60.0


async def after_step(store: Store, folder: Folder, step: int, spent: Spent, ended_at: float) -> Uncounted:
    """The uncounted cost after this step, whose record is not written yet."""
    before = await read(store, folder.start.trained(step - 1), Trained) if step else None
    waiting = Uncounted() if before is None else before.uncounted
    if waiting.sampled_tokens and ended_at // _MINUTE_S > waiting.since // _MINUTE_S:
        await _count(store, folder, f"steps before {step}", waiting)
        waiting = Uncounted()
    return Uncounted(
        since=waiting.since or ended_at,
        prompt_tokens=waiting.prompt_tokens + spent.prompt_tokens,
        sampled_tokens=waiting.sampled_tokens + spent.sampled_tokens,
        device_s=waiting.device_s + spent.sample_device_s,
    )


async def after_evaluation(store: Store, folder: Folder, version: int, spent: Spent) -> None:
    if spent.busy:
        sampled_at = max(end for _, end in spent.busy)
        cost = Uncounted(
            since=sampled_at, prompt_tokens=spent.prompt_tokens, sampled_tokens=spent.sampled_tokens,
            device_s=spent.sample_device_s,
        )  # fmt: skip
        await _count(store, folder, f"evaluation of {version}", cost)


async def after_all(store: Store, folder: Folder, last: Trained) -> None:
    """Count the rest when the job has ended."""
    if last.uncounted.sampled_tokens:
        await _count(store, folder, "the last steps", last.uncounted)


async def _count(store: Store, folder: Folder, what: str, cost: Uncounted) -> None:
    start = folder.start
    row = Sampled(
        session=start.session, base_model=folder.started.base_model, prompt=cost.prompt_tokens,
        sampled=cost.sampled_tokens, device_s=cost.device_s,
    )  # fmt: skip
    own = hashlib.sha256(f"{start}: {what}".encode()).hexdigest()[:32]
    name = record_name(start.tenant, int(cost.since // HOUR_S), own)
    await store.put_if_absent(name, encode(Samplings(rows=[row])))
