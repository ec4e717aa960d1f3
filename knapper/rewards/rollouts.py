"""The rollout to score."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScorableRollout:
    """`answer`: whatever the data says beside the prompt, plain JSON."""

    id: str
    prompt: str | list[dict[str, str]]
    completion: str
    answer: object
