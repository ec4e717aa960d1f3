"""The recipe of episodes: what agents sampled before becomes the loss's data, by what each episode was worth."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from knapper.errors import UserError
from knapper.ids import RunId
from knapper.jobs import advantages, policy, schedule
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round
from knapper.jobs.recipes import RunClients, StepOutcome
from knapper.jobs.rows import EpisodeRow
from knapper.jobs.spec import EpisodesJob


@dataclass(frozen=True)
class Episodes:
    """`advantages`: of the rows, in their order."""

    folder: Folder
    job: EpisodesJob
    rows: Sequence[EpisodeRow]
    advantages: Sequence[float]

    evaluates_in_run = True

    @staticmethod
    def read(folder: Folder, job: EpisodesJob, tokens_max: int) -> "Episodes":
        """Raises UserError, naming the row, for a sequence that does not fit, and if nothing can be learned."""
        rows = [row for row in folder.rows if isinstance(row, EpisodeRow)]
        for n, row in enumerate(rows, 1):
            longest = max(sequence.tokens_T.size for sequence in row.sequences)
            if longest > tokens_max:
                raise UserError(
                    f"row {n} of {job.data}: a sequence has {longest} tokens; allowed: {tokens_max}. Leave the episode "
                    "out, or raise max_tokens if the model's context allows it: nothing is cut"
                )
        found = advantages_of(job, rows)
        if not any(found):
            raise UserError(
                f"{job.data}: within each group all episodes have the same reward, so that there is nothing to learn; "
                "allowed: groups of episodes with different rewards"
            )
        return Episodes(folder, job, rows, found)

    @property
    def steps(self) -> int:
        return schedule.steps_of(self.job, len(self.rows), self.job.batch.episodes)

    @property
    def runs(self) -> Sequence[RunId]:
        return [self.folder.start.run]

    @property
    def scores(self) -> Mapping[Round, int]:
        return {"steps": 0, "evaluations": 0}

    async def train(self, clients: RunClients, step: int) -> StepOutcome:
        """The mean over the batch's sampled tokens."""
        batch = self._batch(step)
        sampled = sum(_sampled(self.rows[row]) for row in batch)
        taught = [row for row in batch if self.advantages[row]]
        data = [
            policy.datum(
                each.tokens_T, each.sampled_T, each.logprobs_T, self.advantages[row] / sampled,
                masked=self.job.loss.name == "gspo",
            )
            for row in taught
            for each in self.rows[row].sequences
        ]  # fmt: skip
        rewards = [self.rows[row].reward for row in batch]
        metrics = {
            "reward/mean": float(np.mean(rewards)),
            "reward/std": float(np.std(rewards)),
            "tokens/mean": sampled / len(batch),
            "rows/silent": float(len(batch) - len(taught)),
        }
        pass_metrics = policy.Metrics()
        if data:
            values = schedule.adamw(self.job.optimizer, step, self.steps)
            stepped, pass_metrics = await policy.step(clients.run, data, self.job.loss, values)
            metrics |= stepped
        return StepOutcome(metrics, readable=self._readable(batch), pass_metrics=pass_metrics)

    async def evaluate(self, _clients: RunClients, _version: int) -> StepOutcome:
        raise AssertionError("nothing is held out")

    def _batch(self, step: int) -> list[int]:
        total = None if self.job.epochs is None else len(self.rows) * self.job.epochs
        return schedule.rows(self.job.seed, step, self.job.batch.episodes, len(self.rows), total)

    def _readable(self, batch: Sequence[int]) -> bytes:
        """JSON Lines, an episode a line."""
        return b"".join(
            msgspec.json.encode(
                {
                    "id": self.rows[row].episode, "group": self.rows[row].group, "reward": self.rows[row].reward,
                    "advantage": self.advantages[row], "sequences": len(self.rows[row].sequences),
                    "tokens": _sampled(self.rows[row]),
                }
            )
            + b"\n"
            for row in batch
        )  # fmt: skip


def advantages_of(job: EpisodesJob, rows: Sequence[EpisodeRow]) -> list[float]:
    """Each episode's, within all of its group; those that name no group are one."""
    found, groups = np.zeros(len(rows)), defaultdict[str, list[int]](list)
    for n, row in enumerate(rows):
        groups[row.group].append(n)
    for members in groups.values():
        found[members] = advantages.FORMULAS[job.advantage](np.array([rows[n].reward for n in members], np.float64))
    return [float(each) for each in found]


def _sampled(row: EpisodeRow) -> int:
    """Tokens."""
    return sum(int(sequence.sampled_T.sum()) for sequence in row.sequences)
