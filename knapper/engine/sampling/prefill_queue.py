"""Who waits, and who of them begins or goes on in the next pass over prompts."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from knapper.concurrency.fair_share import FairShare
from knapper.engine.sampling.sequence import Isolation, RunningSequence, SequenceGroup

_ROWS_MAX: Final = 512  # tokens of one pass over prompts (a longer one goes alone): bounds how long decoding waits
_JOBS_MAX: Final = 64  # of one pass: bounds vocabulary-wide tensors


class WaitingJobs:
    """Jobs with texts that have not begun: tenants share by the tokens that are computed for them, jobs wait in line.

    `turn`: texts of a job that begin before it goes to the end of the line.
    """

    def __init__(self, turn: int) -> None:
        self._turn = turn
        self._line: deque[SequenceGroup] = deque()
        self._shares = FairShare()

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._line)

    def join(self, jobs: Iterable[SequenceGroup]) -> None:
        for job in jobs:
            job.turn = self._turn
            self._line.append(job)
            self._shares.join(job.request.tenant)

    def drop(self, job: SequenceGroup) -> None:
        if job in self._line:
            self._line.remove(job)

    def clear(self) -> None:
        self._line.clear()

    def in_turn(self) -> Iterator[SequenceGroup]:
        """The order in which they are served; it counts what those before will begin as if it were computed already."""
        lines: dict[str, deque[SequenceGroup]] = {}
        for job in self._line:
            lines.setdefault(job.request.tenant, deque()).append(job)
        served = {tenant: self._shares.rank(tenant)[0] for tenant in lines}
        while lines:
            tenant = min(lines, key=served.__getitem__)
            job = lines[tenant].popleft()
            served[tenant] += job.prompt_tokens + min(job.left, job.turn)
            if not lines[tenant]:
                del lines[tenant]
            yield job

    def begin(self, job: SequenceGroup, count: int) -> list[RunningSequence]:
        """So many of its texts. It is first in line again while its turn lasts, else last."""
        self._line.remove(job)
        texts = job.begin(count)
        job.turn -= count
        if job.left and job.turn > 0:
            self._line.appendleft(job)
        elif job.left:
            job.turn = self._turn
            self._line.append(job)
        return texts

    def take_back(self, text: RunningSequence) -> None:
        """It has no token as yet: it begins again, before others."""
        job = text.job
        job.take_back(text)
        job.turn += 1
        if job not in self._line:
            self._line.appendleft(job)

    def keep_prompts(self, free: int) -> int:
        """Of those that are kept, the first in line stay, in so many positions. Returns what is left of these."""
        for job in self._line:
            if job.kept is not None:
                free -= job.prompt_tokens
                if free < 0:
                    job.kept = None
        return free

    def serve(self, job: SequenceGroup) -> None:
        """It is the first of a pass."""
        self._shares.serve(job.request.tenant)

    def charge(self, job: SequenceGroup, tokens: int) -> None:
        """So many were computed for it."""
        self._shares.charge(tokens, job.request.tenant)

    def keep_shares_of(self, jobs: Iterable[SequenceGroup]) -> None:
        """These are all that are not finished."""
        self._shares.leave((job.request.tenant,) for job in jobs)


@dataclass(frozen=True)
class FreeCapacity:
    """What is free: `slots`, and `positions` to reserve. `decoding`: whose texts have the others."""

    slots: int
    positions: int
    decoding: Sequence[SequenceGroup]
    overtaken_max: int  # texts that may begin before those of a job that came first


def next_turns(
    waiting: Iterable[SequenceGroup], places: FreeCapacity, rows_of: Callable[[SequenceGroup], int]
) -> list[tuple[SequenceGroup, int]]:
    """Which jobs begin now and how many texts each, in order, until the first for which there is no room.

    Who may only begin when no other job decodes is overtaken, a number of times. `rows_of`: of a job's prompt.
    """
    turns: list[tuple[SequenceGroup, int]] = []
    skipped: list[SequenceGroup] = []
    slots, free, rows = places.slots, places.positions, 0
    prompts: set[tuple[str, bytes]] = set()  # of this turn: each is computed once
    for job in waiting:
        if not _joins(job, [*places.decoding, *(other for other, _ in turns)]):
            skipped.append(job)
            continue
        if any(other.overtaken >= places.overtaken_max for other in skipped):
            break
        if job.needs_prefill and (prompt := (job.request.adapter, job.request.prompt.tobytes())) not in prompts:
            prompts.add(prompt)
            rows += rows_of(job)
        if turns and (_apart(*(other for other, _ in turns), job) or rows > _ROWS_MAX or len(turns) == _JOBS_MAX):
            break
        wanted = job.left if job.cost == 0 else min(job.left, job.turn)
        count = wanted if job.cost == 0 else min(wanted, slots, free // job.cost)
        if count > 0:
            turns.append((job, count))
            for other in skipped:
                other.overtaken += count
        if count < wanted:
            break
        slots, free = slots - (count if job.cost else 0), free - count * job.cost
    return turns


def next_parked(parked: Iterable[RunningSequence], places: FreeCapacity) -> list[RunningSequence]:
    """Which parked texts go on now, in order, until the first for which there is no room."""
    chosen: list[RunningSequence] = []
    slots, free, rows = places.slots, places.positions, 0
    for text in parked:
        slots, free, rows = slots - 1, free - text.job.cost, rows + text.length
        jobs = [each.job for each in chosen]
        if slots < 0 or free < 0 or not _joins(text.job, [*places.decoding, *jobs]):
            break
        if chosen and (_apart(*jobs, text.job) or rows > _ROWS_MAX):
            break
        chosen.append(text)
    return chosen


def _apart(*jobs: SequenceGroup) -> bool:
    """Whether one of them shares no pass over prompts."""
    return any(job.company > Isolation.ANY for job in jobs)


def _joins(job: SequenceGroup, decoding: Iterable[SequenceGroup]) -> bool:
    """Whether the job's texts may decode beside those of these jobs."""
    others = set(decoding) - {job}
    alone = job.suspect or job.company == Isolation.NOBODY or any(other.suspect for other in others)
    return not (alone and others)
