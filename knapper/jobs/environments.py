"""reward's part of episodes: what the environments of one prompt's rollouts say, until all of them have ended.

An answer is a record, and so is each turn: an environment that was lost with its process hears the turns again.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from knapper.concurrency.tasks import together
from knapper.errors import damaged
from knapper.jobs import schedule
from knapper.jobs.episode_groups import EpisodeGroup, read_group
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round
from knapper.jobs.plays import EnvironmentCode, EpisodeSoFar, Played
from knapper.jobs.progress import RoundParts
from knapper.jobs.rows import RlRow
from knapper.jobs.services import JobServices
from knapper.jobs.spec import EnvironmentSpec, RlJob
from knapper.rewards import spec
from knapper.rewards.scorer import RewardFailed
from knapper.state.job_records import (
    EnvironmentAnswer,
    EnvironmentAnswers,
    Rollout,
    Rollouts,
    RolloutTurn,
    SampledTurn,
    Score,
    Scores,
    encode,
    read,
)

Play = Callable[[EnvironmentCode, EpisodeSoFar], Awaitable[Played]]


@dataclass(frozen=True)
class Environments:
    """Those of one job. `play`: knapper.rewards.plays.play, with the sandbox of this process."""

    services: JobServices
    folder: Folder
    job: RlJob
    environment: EnvironmentSpec
    play: Play

    async def move(self, kind: Round, n: int, part: int, parts: RoundParts) -> bool:
        """Answer the newest turn of one prompt's rollouts. Whether that was the last: then they have their scores.

        Raises RewardFailed, unless the job skips such groups.
        """
        start, began_at = self.folder.start, self.services.clock()
        if part in parts.rollouts:
            await self._score(kind, n, part, "", began_at, began_at)
            return True
        counts = parts.answered[part], parts.turns[part]
        group = await read_group(self.services.store, start, kind, n, part, counts, self.environment.turns)
        try:
            answered = await self._answered(group, kind, n, part, began_at)
        except RewardFailed as error:
            if self.job.on_reward_error == "fail":
                raise
            await self._finish(group, kind, n, part, str(error), began_at)
            return True
        group = replace(group, answers=[*group.answers, answered])
        if group.live(self._samples(kind)):
            name = start.answered(kind, n, part, len(group.answers) - 1)
            await self.services.store.put_if_absent(name, encode(answered))
            return False
        await self._finish(group, kind, n, part, "", began_at)
        return True

    async def _answered(
        self, group: EpisodeGroup, kind: Round, n: int, part: int, began_at: float
    ) -> EnvironmentAnswers:
        """What the environments say to the newest turn; the first time, what they all begin with."""
        row = schedule.row(self.job, kind, n, part, len(self.folder.rows))
        samples = self._samples(kind)
        own: list[EnvironmentAnswer | None] = [None] * samples
        tools = b""
        if not group.answers:
            played = await self._play(group, kind, n, part, 0)
            own, tools = [_answer(played)] * samples, msgspec.json.encode(played.tools)
        else:
            live = group.live(samples)
            plays = await together(self._play(group, kind, n, part, sample) for sample in live)
            for sample, played in zip(live, plays, strict=True):
                own[sample] = _answer(played)
        return EnvironmentAnswers(row=row, answers=own, tools=tools, began_at=began_at, ended_at=self.services.clock())

    async def _play(self, group: EpisodeGroup, kind: Round, n: int, part: int, sample: int) -> Played:
        spec_, row = self.environment, self._row(kind, n, part)
        code = EnvironmentCode(spec_.code, spec.text_of(spec_.code, self.folder.files[spec_.code]), spec_.timeout_s)
        answers = [said for each in group.answers if (said := each.answers[sample]) is not None]
        episode = EpisodeSoFar(
            id=f"{schedule.label(kind, n)}/{part}/{sample}",
            seed=f"{self.job.seed}/{schedule.seed_of(kind, n)}/{part}",
            prompt=row.prompt, answer=row.answer,
            turns=[msgspec.json.decode(turn.message) for turn in group.of(sample)],
            digests=[said.digest for said in answers],
        )  # fmt: skip
        return await self.play(code, episode)

    def _row(self, kind: Round, n: int, part: int) -> RlRow:
        rows = self.folder.rows if kind == "steps" else self.folder.held_out
        row = rows[schedule.row(self.job, kind, n, part, len(self.folder.rows))]
        assert isinstance(row, RlRow), "the job is one of rl"
        return row

    def _samples(self, kind: Round) -> int:
        if kind == "steps":
            return self.job.batch.samples
        assert self.job.evaluate is not None, "a job without it has no such rounds"
        return self.job.evaluate.samples

    async def _finish(self, group: EpisodeGroup, kind: Round, n: int, part: int, refused: str, began_at: float) -> None:
        """Write the rollouts as training reads them, and their scores."""
        label, samples = schedule.label(kind, n), self._samples(kind) if group.turns else 0
        rollouts = [_rollout(group, sample, f"{label}/{part}/{sample}") for sample in range(samples)]
        turns, answers = group.turns, group.answers
        sampled = [turn for each in turns for turn in each.turns if turn is not None and not turn.overflows]
        now = self.services.clock()
        record = Rollouts(
            row=schedule.row(self.job, kind, n, part, len(self.folder.rows)),
            prompt_tokens=next((turn.prompt for each in turns for turn in each.turns if turn is not None), b""),
            rollouts=rollouts, began_at=turns[0].began_at if turns else now,
            ended_at=turns[-1].ended_at if turns else now,
            device_s=sum(each.device_s for each in turns), drawn=turns[0].drawn if turns else None,
            prefilled=_prefilled(group, samples) if sampled else 0,
            busy=[(each.began_at, each.ended_at) for each in turns],
        )  # fmt: skip
        await self.services.store.put_if_absent(self.folder.start.rollouts(kind, n, part), encode(record))
        earlier = [(each.began_at, each.ended_at) for each in answers if each.began_at < began_at]
        await self._score(kind, n, part, refused, began_at, answers[0].began_at if answers else began_at, earlier)

    async def _score(
        self, kind: Round, n: int, part: int, refused: str, began_at: float, first_at: float,
        earlier: Sequence[tuple[float, float]] = (),
    ) -> None:  # fmt: skip
        """From the rollouts as they are stored, whoever wrote them: an episode is worth what its turns were."""
        name = self.folder.start.rollouts(kind, n, part)
        record = await read(self.services.store, name, Rollouts)
        if record is None:
            raise damaged(name, "it was written, and is missing")
        scores = [Score(value=sum(turn.reward for turn in each.turns)) for each in record.rollouts]
        now = self.services.clock()
        stored = Scores(
            scores=[] if refused else scores, refused=refused, began_at=first_at, ended_at=now,
            busy=[*earlier, (began_at, now)],
        )  # fmt: skip
        await self.services.store.put_if_absent(self.folder.start.scores(kind, n, part), encode(stored))


def _answer(played: Played) -> EnvironmentAnswer:
    said = played.said
    return EnvironmentAnswer(
        messages=msgspec.json.encode(said.messages), reward=said.reward, done=said.done, digest=played.digests[-1]
    )


def _rollout(group: EpisodeGroup, sample: int, rollout_id: str) -> Rollout:
    """The sequence of an episode: what was sampled, and between that what the environment said."""
    turns = [turn for turn in group.of(sample) if not turn.overflows]
    answers = [said for each in group.answers if (said := each.answers[sample]) is not None]
    spans, tokens, logprobs = list[tuple[int, int]](), list[bytes](), list[bytes]()
    at = 0
    for n, turn in enumerate(turns):
        before = turn.prompt if n else b""  # the first prompt stands beside the rollouts
        tokens += [before, turn.tokens]
        logprobs += [np.zeros(len(before) // 4, "<f4").tobytes(), turn.logprobs]
        first = at + len(before) // 4
        at = first + len(turn.tokens) // 4
        spans.append((first, at))
    return Rollout(
        id=rollout_id, tokens=b"".join(tokens), logprobs=b"".join(logprobs), text=turns[-1].text if turns else "",
        stopped=turns[-1].stopped if turns else False, sampled=spans,
        turns=[_turn(turn, answers[n + 1 : n + 2]) for n, turn in enumerate(turns)], ended=group.ended(sample),
    )  # fmt: skip


def _turn(turn: SampledTurn, answered: Sequence[EnvironmentAnswer]) -> RolloutTurn:
    """`answered`: nothing, where the group was refused before."""
    if not answered:
        return RolloutTurn(completion=turn.text)
    (said,) = answered
    messages = b"" if said.done else said.messages
    return RolloutTurn(completion=turn.text, messages=messages, reward=said.reward)


def _prefilled(group: EpisodeGroup, samples: int) -> int:
    """Tokens of all prompts that were sampled from; the first is one for all rollouts."""
    total = 0
    for sample in range(samples):
        before = 0
        for n, turn in enumerate(turn for turn in group.of(sample) if not turn.overflows):
            before += len(turn.prompt) // 4
            total += before if n or sample == 0 else 0
            before += len(turn.tokens) // 4
    return total
