"""What a kind of job does at a step and at an evaluation; how it is driven is `training`'s."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from knapper.ids import RunId
from knapper.jobs.names import Round
from knapper.jobs.run_client import RunClient
from knapper.state.job_records import Spent


@dataclass(frozen=True)
class Lines:
    """Where operations go: the run that is trained, and the one that is not (dpo).

    `before_at`: when what came before in the run was done.
    """

    run: RunClient
    reference: RunClient
    before_at: float

    @property
    def tokens(self) -> int:
        return self.run.tokens + self.reference.tokens

    @property
    def sent_bytes(self) -> int:
        return self.run.sent_bytes + self.reference.sent_bytes

    @property
    def device_s(self) -> float:
        return self.run.device_s + self.reference.device_s

    @property
    def began_at(self) -> float | None:
        """When the first operation was accepted; None before there was one."""
        return min((each.began_at for each in (self.run, self.reference) if each.began_at is not None), default=None)


@dataclass(frozen=True)
class StepOutcome:
    """Of a step or an evaluation. `spent`: what its rollouts cost; `readable`: them, for people."""

    metrics: dict[str, float]
    spent: Spent = field(default_factory=Spent)
    readable: bytes = b""


class Recipe(Protocol):
    """One job's way. Everything is a function of its folder and of what lies in the store."""

    @property
    def steps(self) -> int: ...

    @property
    def runs(self) -> Sequence[RunId]: ...

    @property
    def evaluates_in_run(self) -> bool:
        """Whether evaluations are operations of the run, between its steps."""

    @property
    def scores(self) -> Mapping[Round, int]:
        """How many prompts of a round must be scored before it can be trained, or evaluated."""

    async def train(self, lines: Lines, step: int, /) -> StepOutcome: ...

    async def evaluate(self, lines: Lines, version: int, /) -> StepOutcome: ...
