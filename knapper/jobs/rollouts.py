"""sample's part of a job: the rollouts of the next rounds, one object per prompt, or per prompt and turn.

A rollout is a function of (adapter, prompt, parameters, seed), and its seed of (job, round, prompt): a repetition
gives the same rollout.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from knapper.catalogue.tokenizer import Language
from knapper.concurrency.tasks import together
from knapper.diagnostics.weights import WeightsReader
from knapper.errors import InvalidField
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.ids import TinkerPath
from knapper.jobs import progress, schedule
from knapper.jobs.episode_groups import EpisodeGroup, read_group
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round, step_name
from knapper.jobs.progress import ProgressReader, RoundParts
from knapper.jobs.rows import RlRow
from knapper.jobs.spec import EnvironmentSpec, RlJob
from knapper.jobs.tokenized_rows import RowTokenizer
from knapper.jobs.turns import TurnTokens, sampled_turn
from knapper.jobs.worker import Slice, SliceOver, Worker
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Rollout, Rollouts, SampledTurn, SampledTurns, encode
from knapper.state.journal.records import Drawn
from knapper.store.cache import LruCache
from knapper.wire.types import Int32, SampleOutput, SampleRequest, SamplingParams
from knapper.wire.types import SampledSequence as Sampled

_SEQUENCES_AT_ONCE = 128  # twice as many as decode at once, to keep the sampler's queue filled
_WATCH_S = 1.0
SOURCE = "knapper/sample"


class SamplingBackend(Protocol):
    """The part of knapper.engine.sampling.sampler.EngineSampler that jobs use."""

    async def sample(self, request: SampleRequest) -> SampleOutput: ...


@dataclass
class RolloutSampler:
    """`context`: the model's context, in tokens. `sampled_by`: backend and dtype."""

    worker: Worker
    sampler: SamplingBackend
    language: Language
    context: int
    sampled_by: str
    _prompts: "LruCache[str, Prompts]" = field(default_factory=LruCache)

    def __post_init__(self) -> None:
        self._services = self.worker.services
        self._progress_reader = ProgressReader(self._services.store)
        self._checkpoints = Checkpoints(self._services.store, self._services.clock)
        self._weights = WeightsReader(self._services.store)

    async def answer(self, event: Event) -> None:
        await self.worker.answer(event, self._work)

    async def _work(self, folder: Folder, within: Slice, event: Event) -> None:
        job = folder.job
        assert isinstance(job, RlJob), "the worker takes no others"
        while True:
            await within.go_on()
            now = await self._progress_reader.look(folder.outline, job.steps)
            for kind, n, prompts in progress.rounds(folder.outline, job, now):
                parts = now.parts(kind, n)
                missing = parts.to_sample(job, prompts)
                if missing:
                    await self._sample(_Round(folder, job, kind, n), parts, missing, within)
                if missing or len(parts.scores) < prompts:
                    moves = 0 if job.environment is None else parts.moves + len(missing)
                    ring = self._services.notifier.ring
                    await ring(event, cloudevents.ROLLOUTS_SAMPLED, SOURCE, n, kind, moves)
                if missing:
                    break
            else:
                return

    async def _sample(self, job_round: "_Round", parts: RoundParts, missing: Sequence[int], within: Slice) -> None:
        """Sample the missing prompts, several at a time. Raises SliceOver if not all were begun, and Stopped."""
        adapter = await self._adapter(job_round)
        environment, prompts = job_round.job.environment, Prompts([], [])
        if environment is None:
            prompts = await self._prompts.get(
                str(job_round.folder.start), lambda: asyncio.to_thread(self._encode, job_round)
            )
        gate = asyncio.Semaphore(max(1, _SEQUENCES_AT_ONCE // job_round.samples))

        async def sample_unless_over(part: int) -> bool:
            async with gate:
                over = self._services.clock() >= within.end
                if not over and environment is not None:
                    await self._sample_turn(job_round, environment, part, parts, adapter)
                elif not over:
                    await self._sample_one(job_round, part, prompts, adapter)
                return over

        tasks = [asyncio.ensure_future(sample_unless_over(part)) for part in missing]
        samples, watch = asyncio.gather(*tasks), asyncio.ensure_future(_watch(within))
        try:
            await asyncio.wait((samples, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            if any(samples.result()):
                raise SliceOver
        finally:
            for task in (*tasks, watch):
                task.cancel()
            await asyncio.gather(*tasks, samples, watch, return_exceptions=True)

    async def _sample_one(self, job_round: "_Round", part: int, prompts: "Prompts", adapter: str) -> None:
        began_at = self._services.clock()
        row, tokens = job_round.row(part), prompts.of(job_round.kind, job_round.row(part))
        drawn = await self._drawn(job_round, adapter)
        seed = schedule.sample_seed(job_round.job.seed, job_round.seed_of, part)
        output = await self.sampler.sample(job_round.request(adapter, tokens, seed, job_round.samples))
        rollouts = [
            Rollout(
                id=f"{job_round.label}/{part}/{n}",
                tokens=sequence.tokens.astype("<i4").tobytes(),
                logprobs=sequence.logprobs.astype("<f4").tobytes(),
                text=_text(self.language, sequence, job_round.params.stop_strings),
                stopped=sequence.stopped,
            )
            for n, sequence in enumerate(output.sequences)
        ]
        record = Rollouts(
            row=row, prompt_tokens=np.array(tokens, "<i4").tobytes(), rollouts=rollouts, began_at=began_at,
            ended_at=self._services.clock(), device_s=output.device_s, drawn=drawn,
        )  # fmt: skip
        name = job_round.folder.start.rollouts(job_round.kind, job_round.n, part)
        await self._services.store.put_if_absent(name, encode(record))

    async def _sample_turn(
        self, job_round: "_Round", environment: EnvironmentSpec, part: int, parts: RoundParts, adapter: str
    ) -> None:
        """The next turn of one prompt's rollouts, as far as their episodes go on."""
        began_at, turn = self._services.clock(), parts.turns[part]
        start, store = job_round.folder.start, self._services.store
        counts = parts.answered[part], turn
        group = await read_group(store, start, job_round.kind, job_round.n, part, counts, environment.turns)
        drawn = await self._drawn(job_round, adapter)
        tokenizer = TurnTokens(self.language, job_round.folder.started.started_at, self.context)
        prompts = await asyncio.to_thread(self._turn_prompts, job_round, tokenizer, group)
        fitting = [n for n, (before, new) in prompts.items() if before.size + new.size <= job_round.capacity(self)]
        requests = [job_round.turn_request(adapter, prompts[n], part, turn, n) for n in fitting]
        if not turn and fitting:  # one prompt for all
            requests = [replace(requests[0], num_samples=len(fitting))]
        outputs = await together(map(self.sampler.sample, requests))
        sequences = dict(zip(fitting, (each for output in outputs for each in output.sequences), strict=True))
        turns: list[SampledTurn | None] = [None] * job_round.samples
        for n, (_, new) in prompts.items():
            turns[n] = SampledTurn(prompt=new.astype("<i4").tobytes(), overflows=True)
            if n in sequences:
                tokens = sequences[n].tokens.tolist()
                text = _cut(tokenizer.text(tokens, group.tools), sequences[n], job_round.params.stop_strings)
                turns[n] = sampled_turn(new, sequences[n], text, tokenizer.message(text, group.tools, turn))
        record = SampledTurns(
            turns=turns, began_at=began_at, ended_at=self._services.clock(), drawn=drawn,
            device_s=sum(output.device_s for output in outputs),
        )  # fmt: skip
        await store.put_if_absent(start.turn(job_round.kind, job_round.n, part, turn), encode(record))

    def _turn_prompts(
        self, job_round: "_Round", tokenizer: TurnTokens, group: EpisodeGroup
    ) -> dict[int, tuple[Int32, Int32]]:
        """Of each rollout that goes on: the tokens so far, and those that are new. Raises UserError."""
        tools, prompts = group.tools, dict[int, tuple[Int32, Int32]]()
        for n in group.live(job_round.samples):
            said = group.last(n)
            assert said is not None, "its environment has answered"
            before = group.of(n)
            if not before:
                first = prompts[min(prompts)] if prompts else (group.tokens(n), tokenizer.first(said, tools))
                prompts[n] = first  # all have the same: their environments began alike
                what = "what reset of the environment returns: the prompt"
                self._expect_prompt(len(first[1]), what, job_round.capacity(self))
            else:
                prompts[n] = group.tokens(n), tokenizer.following(said, tools, before[-1].tokens)
        return prompts

    def _expect_prompt(self, tokens: int, what: str, capacity: int) -> None:
        """Raises InvalidField for a prompt that does not fit."""
        if not 1 <= tokens <= capacity:
            raise InvalidField(
                f"{what}'s length in tokens", tokens,
                f"1 to {capacity}: the model's context is {self.context}, and sampling.max_tokens "
                f"{self.context - capacity}", "Shorten the prompt, or lower sampling.max_tokens",
            )  # fmt: skip

    async def _drawn(self, job_round: "_Round", adapter: str) -> Drawn:
        """By which weights the completions of one prompt are drawn."""
        weights, params = await self._weights.of(adapter), job_round.params
        truncated = params.top_k != -1 or params.top_p != 1.0
        return Drawn(
            run=weights.run, seq=weights.seq, step=weights.step, digest=weights.digest, sampler=self.sampled_by,
            temperature=params.temperature, truncated=truncated, datums=job_round.samples,
        )  # fmt: skip

    async def _adapter(self, job_round: "_Round") -> str:
        """The bundle of the version that the round samples from; of version 0 what the job began with, if anything."""
        if job_round.version == 0:
            return job_round.folder.started.source
        path = TinkerPath(job_round.folder.start.run, "sampler_weights", step_name(job_round.version))
        return (await self._checkpoints.own(path, job_round.folder.start.tenant)).bundle

    def _encode(self, job_round: "_Round") -> "Prompts":
        """Every prompt of the job, each checked to fit. Raises UserError."""
        folder, job = job_round.folder, job_round.job
        tokenizer = RowTokenizer(self.language, folder.started.started_at, self.context)
        capacity = job_round.capacity(self)
        prompts = []
        for file, rows in ((job.data, folder.rows), (job.evaluate.data if job.evaluate else "", folder.held_out)):
            tokens = []
            for n, row in enumerate(rows):
                assert isinstance(row, RlRow)
                tokens.append(tokenizer.prompt(row.prompt))
                self._expect_prompt(len(tokens[-1]), f"row {n + 1} of {file}: the prompt", capacity)
            prompts.append(tokens)
        return Prompts(*prompts)


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts, by row."""

    rows: Sequence[list[int]]
    held_out: Sequence[list[int]]

    def of(self, kind: Round, row: int) -> list[int]:
        return self.rows[row] if kind == "steps" else self.held_out[row]


@dataclass(frozen=True)
class _Round:
    folder: Folder
    job: RlJob
    kind: Round
    n: int

    @property
    def version(self) -> int:
        return schedule.sampled_from(self.job, self.n) if self.kind == "steps" else self.n

    @property
    def samples(self) -> int:
        if self.kind == "steps":
            return self.job.batch.samples
        assert self.job.evaluate is not None, "a job without it has no such rounds"
        return self.job.evaluate.samples

    @property
    def params(self) -> SamplingParams:
        sampling = self.job.sampling
        stops = tuple(sampling.stop)
        if self.kind == "steps":
            return SamplingParams(
                max_tokens=sampling.max_tokens, stop_strings=stops, temperature=sampling.temperature,
                top_k=sampling.top_k, top_p=sampling.top_p,
            )  # fmt: skip
        assert self.job.evaluate is not None, "a job without it has no such rounds"
        return SamplingParams(
            max_tokens=sampling.max_tokens, stop_strings=stops, temperature=self.job.evaluate.temperature
        )

    def capacity(self, sampler: RolloutSampler) -> int:
        """Tokens that a prompt may have."""
        return sampler.context - self.job.sampling.max_tokens

    def request(self, adapter: str, prompt: Sequence[int] | Int32, seed: int, samples: int) -> SampleRequest:
        return SampleRequest(
            base_model=self.folder.started.base_model, adapter=adapter, prompt=np.array(prompt, np.int32),
            params=self.params, seed=seed, num_samples=samples, tenant=self.folder.start.tenant,
        )  # fmt: skip

    def turn_request(
        self, adapter: str, prompt: tuple[Int32, Int32], part: int, turn: int, sample: int
    ) -> SampleRequest:
        seed = schedule.sample_seed(self.job.seed, self.seed_of, part)
        if turn:
            seed = schedule.turn_seed(self.job.seed, self.seed_of, part, turn, sample)
        return self.request(adapter, np.concatenate(prompt), seed, 1)

    @property
    def seed_of(self) -> str:
        return schedule.seed_of(self.kind, self.n)

    @property
    def label(self) -> str:
        return schedule.label(self.kind, self.n)

    def row(self, part: int) -> int:
        return schedule.row(self.job, self.kind, self.n, part, self.folder.started.rows)


async def _watch(within: Slice) -> None:
    """Raises Stopped soon after the job was cancelled."""
    while True:
        await asyncio.sleep(_WATCH_S)
        await within.expect_running()


def _text(language: Language, sequence: Sampled, stops: Sequence[str]) -> str:
    """The text without its stop string."""
    text = str(language.tokenizer.decode(sequence.tokens.tolist(), skip_special_tokens=True))
    return _cut(text, sequence, stops)


def _cut(text: str, sequence: Sampled, stops: Sequence[str]) -> str:
    if not sequence.stopped:
        return text
    ends = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(ends)] if ends else text
