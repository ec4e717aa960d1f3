"""What happens at which step: pure functions of the job and the step's number.

Step k makes version k + 1 of the adapter out of version k; version 0 is the untouched one.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from knapper.jobs.names import Round
from knapper.jobs.spec import AnyJob, DpoJob, EpisodesJob, Optimizer, RlJob
from knapper.wire import types


def adamw(optimizer: Optimizer, step: int, steps: int) -> types.AdamW:
    """Of step 0 to steps - 1: up in a straight line over the warmup, then as the schedule says, down to `final`."""
    warm, part = warmup_steps(optimizer, steps), 1.0
    if step < warm:
        part = (step + 1) / (warm + 1)
    elif optimizer.schedule != "constant":
        done = (step - warm) / max(steps - warm, 1)
        fall = done if optimizer.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
        part = 1 - (1 - optimizer.final) * fall
    return types.AdamW(
        learning_rate=optimizer.learning_rate * part, beta1=optimizer.beta1, beta2=optimizer.beta2,
        eps=optimizer.eps, weight_decay=optimizer.weight_decay, grad_clip_norm=optimizer.grad_clip_norm,
    )  # fmt: skip


def steps_of(job: DpoJob | EpisodesJob, rows: int, batch: int) -> int:
    """As the job says, or those of its epochs, of which the last step may have fewer rows than `batch`."""
    if job.steps is not None:
        return job.steps
    assert job.epochs is not None, "the spec has one of the two"
    return math.ceil(rows * job.epochs / batch)


def warmup_steps(optimizer: Optimizer, steps: int) -> int:
    """A ratio is rounded up, as transformers does; first to a millionth, so that 0.07 of 100 steps are 7, not 8."""
    if optimizer.warmup_ratio is None:
        return optimizer.warmup_steps
    return math.ceil(round(optimizer.warmup_ratio * steps, 6))


def sampled_from(job: RlJob, step: int) -> int:
    """The version of the adapter that the step's rollouts come from."""
    return max(0, step - job.max_staleness)


def evaluated(job: AnyJob, version: int, steps: int) -> bool:
    """Whether this version of the adapter is evaluated: the first, the last, and every so many between."""
    evaluate = job.evaluate
    if evaluate is None:
        return False
    return version in (0, steps) or (evaluate.every > 0 and version % evaluate.every == 0)


def decided(job: AnyJob, version: int) -> int:
    """The newest version up to this one whose evaluation may stop the job before its last step; 0: none."""
    if job.stop_early is None or job.evaluate is None:
        return 0
    return version // job.evaluate.every * job.evaluate.every


def rows(seed: int, step: int, batch: int, count: int, total: int | None = None) -> list[int]:
    """The rows (0 to count - 1) of a step: the data in a new order each epoch, cut into batches without a gap.

    `total`: how many there are in all epochs, where the last batch is not filled up.
    """
    end = (step + 1) * batch if total is None else min((step + 1) * batch, total)
    orders: dict[int, Sequence[int]] = {}
    chosen = []
    for at in range(step * batch, end):
        epoch, index = divmod(at, count)
        if epoch not in orders:
            orders[epoch] = order(seed, epoch, count)
        chosen.append(orders[epoch][index])
    return chosen


def order(seed: int, epoch: int, count: int) -> Sequence[int]:
    """A permutation of 0 to count - 1 that depends on the seed and the epoch alone."""
    generator = np.random.Generator(np.random.Philox(key=_number("order", seed, epoch, bits=128)))
    return generator.permutation(count).tolist()  # type: ignore[no-any-return]  # numpy says Any


def sample_seed(seed: int, round_name: str, prompt: int) -> int:
    """Of all samples of one prompt of one round; sample i of them draws from (this seed, i)."""
    return _number("sample", seed, round_name, prompt, bits=62)


def turn_seed(seed: int, round_name: str, prompt: int, turn: int, sample: int) -> int:
    """Of one sample's turn after the first, which has a seed of its own because each has a prompt of its own."""
    return _number("turn", seed, round_name, prompt, turn, sample, bits=62)


def row(job: RlJob, kind: Round, n: int, part: int, count: int) -> int:
    """The row (0 to count - 1) of a round's prompt; `count`: how many the data has."""
    return part if kind == "evaluations" else rows(job.seed, n, job.batch.prompts, count)[part]


def seed_of(kind: Round, n: int) -> str:
    """The round's part of seeds. All versions are evaluated with the same ones, so that they can be compared."""
    return f"steps/{n}" if kind == "steps" else "evaluations"


def label(kind: Round, n: int) -> str:
    """How ids of rollouts begin."""
    return str(n + 1) if kind == "steps" else f"e{n}"


def _number(*of: object, bits: int) -> int:
    digest = hashlib.sha256(":".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest[:16], "little") & ((1 << bits) - 1)
