"""What each kind of job does in a step and in an evaluation; `runner` drives it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from knapper.ids import RunId
from knapper.jobs.names import Round
from knapper.jobs.run_client import RunClient
from knapper.state.job_records import Spent
from knapper.state.journal.records import Drawn


@dataclass(frozen=True)
class RunClients:
    """Clients of a job's two runs: the trained one, and dpo's untrained reference.

    `before_at`: when the previous step or evaluation in the run was done.
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
        """When the first operation was accepted; None before the first."""
        return min((run.began_at for run in (self.run, self.reference) if run.began_at is not None), default=None)


@dataclass(frozen=True)
class StepOutcome:
    """Result of a step or an evaluation. `spent`: the cost of its rollouts; `readable`: the rollouts as JSON Lines.

    `pass_metrics`, `drawn`: of a step's forward_backward, and by which weights its data was drawn, if it has samples.
    """

    metrics: dict[str, float]
    spent: Spent = field(default_factory=Spent)
    readable: bytes = b""
    pass_metrics: Mapping[str, float] = field(default_factory=dict)
    drawn: Sequence[Drawn] = ()


class Recipe(Protocol):
    """How one job is trained. Everything depends only on its folder and the store."""

    @property
    def steps(self) -> int: ...

    @property
    def runs(self) -> Sequence[RunId]: ...

    @property
    def evaluates_in_run(self) -> bool:
        """Whether evaluations are operations of the run, between its steps."""

    @property
    def scores(self) -> Mapping[Round, int]:
        """How many prompts of a round must be scored before it can be trained on or evaluated."""

    async def train(self, lines: RunClients, step: int, /) -> StepOutcome: ...

    async def evaluate(self, lines: RunClients, version: int, /) -> StepOutcome: ...
