"""How far a job is, from the names of its objects in the store; and which work is open.

Step k: its prompts are sampled, each sample is scored, then it is trained, which makes version k + 1 of the adapter.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from knapper.ids import number
from knapper.jobs import schedule
from knapper.jobs.names import Round, Start
from knapper.jobs.spec import AnyJob, RlJob
from knapper.state.job_records import Evaluated, read
from knapper.store import Store


@dataclass(frozen=True)
class Outline:
    """What the progress of a job depends on. `held_out`: number of evaluation rows."""

    start: Start
    job: AnyJob
    held_out: int


@dataclass
class RoundParts:
    """One round: the prompts whose rollouts, and whose scores, exist.

    `turns`, `answered`: of a prompt with an environment, how many turns are sampled, and how often it has answered.
    """

    rollouts: set[int] = field(default_factory=set)
    scores: set[int] = field(default_factory=set)
    done: bool = False  # trained, or evaluated
    turns: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)

    @property
    def moves(self) -> int:
        return self.turns.total() + self.answered.total()

    def to_sample(self, job: RlJob, prompts: int) -> list[int]:
        """The prompts that wait for the sampler."""
        missing = sorted(set(range(prompts)) - self.rollouts)
        if job.environment is None:
            return missing
        return [part for part in missing if self.answered[part] > self.turns[part]]

    def to_score(self, job: RlJob, prompts: int) -> list[int]:
        """Those that wait for the reward, or for their environment."""
        if job.environment is None:
            return sorted(self.rollouts - self.scores)
        unscored = sorted(set(range(prompts)) - self.scores)
        return [part for part in unscored if part in self.rollouts or self.answered[part] == self.turns[part]]


@dataclass(frozen=True)
class Progress:
    """`trained`: steps done, which is the newest version of the adapter. `rounds`: from there on."""

    trained: int
    rounds: Mapping[tuple[Round, int], RoundParts]
    evaluated_to: int  # all versions below it are evaluated that have to be
    stopped: int | None = None  # the last version, where an evaluation of it has ended the job early

    def end(self, steps: int) -> int:
        """The last version. `steps`: as planned."""
        return steps if self.stopped is None else self.stopped

    def parts(self, kind: Round, n: int) -> RoundParts:
        return self.rounds.get((kind, n), RoundParts())


async def newest_step(store: Store, start: Start) -> int:
    """Number of steps done, by galloping search: they are dense, and there may be many."""
    done, beyond = 0, 1
    while await store.get(start.trained(beyond - 1)) is not None:
        done, beyond = beyond, 2 * beyond
    while beyond - done > 1:
        middle = (done + beyond) // 2
        if await store.get(start.trained(middle - 1)) is not None:
            done = middle
        else:
            beyond = middle
    return done


class ProgressReader:
    """Reads progress from the store; remembers finished work, so that each look is short."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[Start, tuple[int, int]] = {}

    async def look(self, outline: Outline, steps: int) -> Progress:
        """`steps`: of the whole job."""
        start = outline.start
        known = self._known.get(start)
        trained, evaluated_to = known if known is not None else (await newest_step(self._store, start), 0)
        rounds: dict[tuple[Round, int], RoundParts] = {}
        begins: tuple[tuple[Round, int], ...] = (("steps", trained), ("evaluations", evaluated_to))
        for kind, first in begins:
            if kind == "evaluations" and outline.job.evaluate is None:
                continue
            prefix = start.rounds(kind)
            for name in await self._store.list(prefix, start_after=f"{prefix}{number(first)}/"):
                n, what, part = _split(name.removeprefix(prefix))
                parts = rounds.setdefault((kind, n), RoundParts())
                if what == "rollouts":
                    parts.rollouts.add(part)
                elif what == "scores":
                    parts.scores.add(part)
                elif what == "turns":
                    parts.turns[part] += 1
                elif what == "answered":
                    parts.answered[part] += 1
                else:
                    parts.done = True
        while rounds.get(("steps", trained), RoundParts()).done:
            trained += 1
        evaluated_to = next(
            (v for v in range(evaluated_to, trained + 1) if _open(outline, rounds, v, steps)), trained + 1
        )
        self._known[start] = (trained, evaluated_to)
        return Progress(trained, rounds, evaluated_to, await self._stopped(outline, trained))

    async def _stopped(self, outline: Outline, trained: int) -> int | None:
        """No later step is trained, or sampled for, before a version that may be the last one is evaluated."""
        version = schedule.decided(outline.job, trained)
        evaluated = await read(self._store, outline.start.evaluated(version), Evaluated) if version else None
        return version if evaluated is not None and evaluated.stop else None


def _open(outline: Outline, rounds: Mapping[tuple[Round, int], RoundParts], version: int, steps: int) -> bool:
    if not schedule.evaluated(outline.job, version, steps):
        return False
    parts = rounds.get(("evaluations", version))
    return parts is None or not parts.done


def _split(name: str) -> tuple[int, str, int]:
    steps = name.split("/")
    return int(steps[0]), steps[1], int(steps[2]) if len(steps) > 2 else 0


def evaluations(outline: Outline, progress: Progress, steps: int) -> Iterator[int]:
    """Versions that exist and are not evaluated yet."""
    steps = progress.end(steps)
    for version in range(progress.evaluated_to, progress.trained + 1):
        if schedule.evaluated(outline.job, version, steps) and not progress.parts("evaluations", version).done:
            yield version


def rounds(outline: Outline, job: RlJob, progress: Progress) -> list[tuple[Round, int, int]]:
    """(kind, number, prompts) of the rounds of an rl job that are open now, the most urgent first."""
    last = min(progress.trained + job.max_staleness, progress.end(job.steps) - 1)
    if job.stop_early is not None and job.evaluate is not None:  # what follows may never be trained
        last = min(last, schedule.decided(job, max(progress.evaluated_to - 1, 0)) + job.evaluate.every - 1)
    steps: Sequence[tuple[Round, int, int]] = [
        ("steps", step, job.batch.prompts) for step in range(progress.trained, last + 1)
    ]
    held_out = outline.held_out
    return [*steps, *(("evaluations", version, held_out) for version in evaluations(outline, progress, job.steps))]


def finished(outline: Outline, progress: Progress, steps: int) -> bool:
    """Whether only the end of the job is left to write."""
    return progress.trained >= progress.end(steps) and next(evaluations(outline, progress, steps), None) is None
