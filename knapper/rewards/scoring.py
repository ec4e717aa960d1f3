"""Scores of rollouts: for each a finite number, and what each term of the reward gave. Anything else is an error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knapper import limits
from knapper.errors import UserError
from knapper.rewards import plain
from knapper.rewards.spec import ExactMatch, Format, Length, Numeric, Reward, Term


@dataclass(frozen=True)
class Rollout:
    """`answer`: whatever the data says beside the prompt, plain JSON."""

    id: str
    prompt: str | list[dict[str, str]]
    completion: str
    answer: object


@dataclass(frozen=True)
class Score:
    """`value`: the weighted sum of `parts`, which are unweighted, by the terms' labels."""

    value: float
    parts: dict[str, float]


class RewardFailed(UserError):
    """The reward gives no number for a rollout: it raised, hung, or returned something else."""

    code = "reward_failed"

    def __init__(self, rollout_id: str, reason: str) -> None:
        shown = (
            reason
            if len(reason) <= limits.reward_reason_chars_max
            else reason[: limits.reward_reason_chars_max - 3] + "..."
        )
        super().__init__(f"rollout {rollout_id}: {shown}")
        self.rollout_id = rollout_id
        self.reason = shown


async def score(reward: Reward, rollouts: Sequence[Rollout]) -> list[Score]:
    """The scores, in order. Raises RewardFailed for the first rollout that has none."""
    by_term = {label: await _values(term, rollouts) for label, term in reward.terms.items()}
    scores = []
    for n, rollout in enumerate(rollouts):
        parts = {label: values[n] for label, values in by_term.items()}
        value = sum(reward.terms[label].weight * part for label, part in parts.items())
        if not math.isfinite(value):
            raise RewardFailed(rollout.id, f"the weighted sum is {value}; allowed: a finite number")
        scores.append(Score(value, parts))
    return scores


async def _values(term: Term, rollouts: Sequence[Rollout]) -> list[float]:
    values = []
    for rollout in rollouts:
        try:
            values.append(_value(term, rollout))
        except UserError as error:
            raise RewardFailed(rollout.id, str(error)) from error
    return values


def _value(term: Term, rollout: Rollout) -> float:
    match term:
        case ExactMatch():
            return plain.exact_match(term, rollout.completion, rollout.answer)
        case Numeric():
            return plain.numeric(term, rollout.completion, rollout.answer)
        case Length():
            return plain.length(term, rollout.completion)
        case Format():
            return plain.format(term, rollout.completion)
    raise NotImplementedError(type(term).__name__)
