"""The rollouts of one prompt that an environment answers, as their records have them: turn by turn."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from knapper.catalogue.tools import Tool
from knapper.errors import damaged
from knapper.jobs import plays
from knapper.jobs.names import Round, Start
from knapper.state.job_records import EnvironmentAnswer, EnvironmentAnswers, Record, SampledTurn, SampledTurns, read
from knapper.store import Store, many
from knapper.wire.types import Int32

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class EpisodeGroup:
    """The rollouts of one prompt so far. `turns[t]` were sampled after `answers[t]`; `limit`: turns at most."""

    answers: Sequence[EnvironmentAnswers]
    turns: Sequence[SampledTurns]
    limit: int

    def last(self, sample: int) -> EnvironmentAnswer | None:
        """What this one's environment said last; None before its first word."""
        return next((said for each in reversed(self.answers) if (said := each.answers[sample]) is not None), None)

    def of(self, sample: int) -> list[SampledTurn]:
        return [turn for each in self.turns if (turn := each.turns[sample]) is not None]

    def ended(self, sample: int) -> str:
        """By whom its episode ended; empty: it goes on, at least with an answer."""
        own, last = self.of(sample), self.last(sample)
        if last is not None and last.done:
            return "done"
        if own and own[-1].overflows:
            return "context"
        answered = sum(each.answers[sample] is not None for each in self.answers)
        return "turns" if answered > self.limit else ""

    def live(self, samples: int) -> list[int]:
        return [n for n in range(samples) if not self.ended(n)]

    @property
    def tools(self) -> list[Tool]:
        return plays.tools_of(msgspec.json.decode(self.answers[0].tools)) if self.answers[0].tools else []

    def tokens(self, sample: int) -> Int32:
        """Of the episode up to its last sampled turn."""
        parts = [np.frombuffer(part, "<i4") for turn in self.of(sample) for part in (turn.prompt, turn.tokens)]
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


async def read_group(store: Store, start: Start, kind: Round, n: int, part: int, counts: tuple[int, int], limit: int
) -> EpisodeGroup:  # fmt: skip
    """`counts`: how many answers and turns there are."""

    async def answered(turn: int) -> EnvironmentAnswers:
        return await _read(store, start.answered(kind, n, part, turn), EnvironmentAnswers)

    async def sampled(turn: int) -> SampledTurns:
        return await _read(store, start.turn(kind, n, part, turn), SampledTurns)

    answers, turns = await asyncio.gather(many.each(range(counts[0]), answered), many.each(range(counts[1]), sampled))
    return EpisodeGroup(answers, turns, limit)


async def _read(store: Store, name: str, kind: type[R]) -> R:
    """Raises Corrupt."""
    if (record := await read(store, name, kind)) is None:
        raise damaged(name, "it was listed, and is missing")
    return record
