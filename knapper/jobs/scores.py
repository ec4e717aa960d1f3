"""reward's part of a job: the scores of rollouts, one object per prompt, and the answers of environments."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from knapper.concurrency.tasks import together
from knapper.errors import damaged
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import progress
from knapper.jobs.environments import Environments, Play
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round
from knapper.jobs.progress import ProgressReader, RoundParts
from knapper.jobs.rows import RlRow
from knapper.jobs.spec import RlJob
from knapper.jobs.worker import Slice, Worker
from knapper.rewards import scorer, spec
from knapper.rewards.spec import Reward
from knapper.state.job_records import Rollout, Rollouts, Score, Scores, encode, read

_GROUPS_AT_ONCE = 4
SOURCE = "knapper/reward"

Judge = Callable[[Reward, Sequence[scorer.ScorableRollout]], Awaitable[list[scorer.RewardScore]]]


@dataclass
class Scoring:
    """`judge`, `play`: those of knapper.rewards.scorer and knapper.jobs.plays, with this process's sandbox."""

    worker: Worker
    judge: Judge
    play: Play

    def __post_init__(self) -> None:
        self._services = self.worker.services
        self._progress_reader = ProgressReader(self._services.store)

    async def answer(self, event: Event) -> None:
        await self.worker.answer(event, self._work)

    async def _work(self, folder: Folder, within: Slice, event: Event) -> None:
        job = folder.job
        assert isinstance(job, RlJob), "the worker takes no others"
        score, ring = self._scorer(folder, job), self._services.notifier.ring
        while True:
            await within.go_on()
            now = await self._progress_reader.look(folder.outline, job.steps)
            for kind, n, prompts in progress.rounds(folder.outline, job, now):
                parts = now.parts(kind, n)
                todo, scored = parts.to_score(job, prompts), set(parts.scores)
                for first in range(0, len(todo), _GROUPS_AT_ONCE):
                    await within.go_on()
                    group = todo[first : first + _GROUPS_AT_ONCE]
                    ended = await together(score(kind, n, part, parts) for part in group)
                    scored |= {part for part, over in zip(group, ended, strict=True) if over}
                if len(scored) == prompts and not parts.done:
                    await ring(event, cloudevents.ROLLOUTS_SCORED, SOURCE, n, kind)
                elif job.environment is not None and len(scored) < prompts:  # the others wait for the sampler
                    await ring(event, cloudevents.ROLLOUTS_ANSWERED, SOURCE, n, kind, parts.moves + len(todo))
                if todo:
                    break
            else:
                return

    def _scorer(self, folder: Folder, job: RlJob) -> Callable[[Round, int, int, RoundParts], Coroutine[Any, Any, bool]]:
        """Goes on with one prompt's rollouts, and says whether they have their scores now."""
        if job.environment is not None:
            return Environments(self._services, folder, job, job.environment, self.play).move
        reward = spec.parse(job.reward, folder.files)
        return lambda kind, n, part, _: self._score(folder, job, reward, kind, n, part)

    async def _score(self, folder: Folder, job: RlJob, reward: Reward, kind: Round, n: int, part: int) -> bool:
        """Score one prompt's rollouts. Raises RewardFailed, unless the job skips such groups."""
        name = folder.start.rollouts(kind, n, part)
        record = await read(self._services.store, name, Rollouts)
        if record is None:
            raise damaged(name, "it was listed, and is missing")
        row = (folder.rows if kind == "steps" else folder.held_out)[record.row]
        assert isinstance(row, RlRow)
        began_at, refused, scores = self._services.clock(), "", list[scorer.RewardScore]()
        try:
            scores = await self.judge(reward, [_scorable(row, rollout) for rollout in record.rollouts])
        except scorer.RewardFailed as error:
            if job.on_reward_error == "fail":
                raise
            refused = str(error)
        stored = [Score(value=score.value, parts=score.parts, reasons=score.reasons) for score in scores]
        score_record = Scores(scores=stored, refused=refused, began_at=began_at, ended_at=self._services.clock())
        await self._services.store.put_if_absent(folder.start.scores(kind, n, part), encode(score_record))
        return True


def _scorable(row: RlRow, rollout: Rollout) -> scorer.ScorableRollout:
    return scorer.ScorableRollout(id=rollout.id, prompt=row.prompt, completion=rollout.text, answer=row.answer)
