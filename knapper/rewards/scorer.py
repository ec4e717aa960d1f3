"""Scores rollouts: a finite number for each, and the value of each term of the reward. Anything else is an error."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from knapper import limits
from knapper.concurrency.tasks import together
from knapper.errors import UserError
from knapper.rewards import plain, sandboxed
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.sandboxed import SandboxResult
from knapper.rewards.spec import ExactMatch, Format, Length, Numeric, Reward, Term
from knapper.sandbox.pool import Sandbox, SandboxMissing
from knapper.text.printable import printable
from knapper.wire.untrusted import parsing

__all__ = ["RewardFailed", "RewardScore", "ScorableRollout", "score"]


@dataclass(frozen=True)
class RewardScore:
    """`value`: the weighted sum of `parts`, which are unweighted, by the terms' labels.

    `reasons`: why a part is 0 although nothing was compared: the completion could not be looked at.
    """

    value: float
    parts: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)


class RewardFailed(UserError):
    """The reward gives no number for a rollout: it raised, hung, or returned something else."""

    code = "reward_failed"

    def __init__(self, rollout_id: str, reason: str) -> None:
        shown = _shown(reason)
        super().__init__(f"rollout {rollout_id}: {shown}")
        self.rollout_id = rollout_id
        self.reason = shown


def _shown(reason: str) -> str:
    text, most = printable(reason), limits.reward_reason_chars_max
    return text if len(text) <= most else text[: most - 3] + "..."


async def score(
    reward: Reward, rollouts: Sequence[ScorableRollout], *, sandbox: Sandbox | None = None
) -> list[RewardScore]:
    """The scores, in order. Raises RewardFailed for a rollout that has none, SandboxMissing where code cannot run.

    `sandbox`: one that outlives the call, whose processes are warm; otherwise the call makes one and ends it.
    """
    for rollout in rollouts:
        _check(rollout)
    own = sandbox or Sandbox()
    try:
        by_term = {label: await _values(term, reward, rollouts, own) for label, term in reward.terms.items()}
    finally:
        if sandbox is None:
            await own.close()
    scores = []
    for n, rollout in enumerate(rollouts):
        parts = {label: outcomes[n].value for label, outcomes in by_term.items()}
        reasons = {label: _shown(why) for label, outcomes in by_term.items() if (why := outcomes[n].reason)}
        value = sum(reward.terms[label].weight * part for label, part in parts.items())
        if not math.isfinite(value):
            raise RewardFailed(rollout.id, f"the weighted sum is {value}; allowed: a finite number")
        scores.append(RewardScore(value, parts, reasons))
    return scores


def _check(rollout: ScorableRollout) -> None:
    """Raises RewardFailed for a text over its limit."""
    with parsing(lambda error: RewardFailed(rollout.id, f"prompt and answer are not plain JSON: {error}")):
        beside = len(msgspec.json.encode((rollout.prompt, rollout.answer)))
    for what, size in (("the completion", len(rollout.completion)), ("prompt and answer as JSON", beside)):
        if size > limits.reward_text_chars_max:
            raise RewardFailed(
                rollout.id, f"{what}: {size} characters; allowed: at most {limits.reward_text_chars_max}"
            )


async def _values(
    term: Term, reward: Reward, rollouts: Sequence[ScorableRollout], sandbox: Sandbox
) -> list[SandboxResult]:
    if not rollouts:
        return []
    with _named(rollouts[0]):
        preload = await sandboxed.imports(term, reward.files, sandbox)

    async def one(rollout: ScorableRollout) -> SandboxResult:
        with _named(rollout):
            return await _value(term, rollout, reward, preload, sandbox)

    return await together(one(rollout) for rollout in rollouts)


async def _value(
    term: Term, rollout: ScorableRollout, reward: Reward, preload: tuple[str, ...], sandbox: Sandbox
) -> SandboxResult:
    match term:
        case ExactMatch():
            return SandboxResult(plain.exact_match(term, rollout.completion, rollout.answer))
        case Numeric():
            return SandboxResult(plain.numeric(term, rollout.completion, rollout.answer))
        case Length():
            return SandboxResult(plain.length(term, rollout.completion))
        case Format():
            return SandboxResult(plain.format(term, rollout.completion))
    return await sandboxed.value(term, rollout, reward.files, preload, sandbox)


@contextmanager
def _named(rollout: ScorableRollout) -> Iterator[None]:
    """Errors inside are reported under the rollout's name."""
    try:
        yield
    except (SandboxMissing, RewardFailed):
        raise
    except UserError as error:
        raise RewardFailed(rollout.id, str(error)) from error
