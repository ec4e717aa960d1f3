"""Recipes over rows of text: supervised fine-tuning and direct preference optimisation."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from knapper.errors import UserError
from knapper.ids import RunId
from knapper.jobs import schedule
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round
from knapper.jobs.preferences import Preference, preference, summed
from knapper.jobs.recipes import RunClients, StepOutcome
from knapper.jobs.rows import ChatRow, CompletionRow, PairRow, Row
from knapper.jobs.run_client import RunClient
from knapper.jobs.spec import DpoJob, SftJob
from knapper.jobs.tokenized_rows import Example, RowTokenizer, pack

Pair = tuple[Example, Example]  # chosen, rejected


@dataclass(frozen=True)
class Sft:
    """`examples`: of the rows, in their order."""

    folder: Folder
    job: SftJob
    examples: Sequence[Example]
    held_out: Sequence[Example]
    tokens_max: int
    _packed: dict[int, list[Example]] = field(default_factory=dict)  # by epoch

    evaluates_in_run = True

    @staticmethod
    async def read(folder: Folder, job: SftJob, tokenizer: RowTokenizer) -> "Sft":
        """Tokenize the rows. Raises UserError, naming the row, for one that does not fit."""

        def examples(file: str, rows: Sequence[Row]) -> list[Example]:
            return [_example(tokenizer, job, row, f"row {n} of {file}") for n, row in enumerate(rows, 1)]

        training = await asyncio.to_thread(examples, job.data, folder.rows)
        held_out = await asyncio.to_thread(examples, job.evaluate.data if job.evaluate else "", folder.held_out)
        return Sft(folder, job, training, held_out, tokenizer.tokens_max)

    @property
    def steps(self) -> int:
        if self.job.steps is not None:
            return self.job.steps
        assert self.job.epochs is not None, "the spec has one of the two"
        total = sum(len(self._sequences(epoch)) for epoch in range(self.job.epochs))
        return math.ceil(total / self.job.batch.sequences)

    @property
    def runs(self) -> Sequence[RunId]:
        return [self.folder.start.run]

    @property
    def scores(self) -> Mapping[Round, int]:
        return {"steps": 0, "evaluations": 0}

    async def train(self, clients: RunClients, step: int) -> StepOutcome:
        """The mean over the batch's counted tokens of -log p."""
        batch = self._batch(step)
        counted = sum(example.counted for example in batch)
        data = [example.datum(1 / counted) for example in batch]
        output = await clients.run.forward_backward(data, "cross_entropy", {})
        values = schedule.adamw(self.job.optimizer, step, self.steps)
        stepped = await clients.run.optim_step(values)
        metrics = {
            "loss/mean": output.metrics["loss:sum"],
            "tokens/counted": float(counted),
            "sequences": float(len(batch)),
            "learning_rate": values.learning_rate,
            "grad_norm": stepped["grad_norm"],
        }
        return StepOutcome(metrics)

    async def evaluate(self, clients: RunClients, _version: int) -> StepOutcome:
        counted = sum(example.counted for example in self.held_out)
        data = [example.datum(1.0) for example in self.held_out]
        output = await clients.run.forward_backward(data, "cross_entropy", {}, forward_only=True)
        loss = output.metrics["loss:sum"] / counted
        return StepOutcome({"loss/mean": loss, "tokens/counted": float(counted)})

    def _batch(self, step: int) -> list[Example]:
        """The step's sequences: epochs one after another, cut into batches without a gap."""
        size, epochs = self.job.batch.sequences, self.job.epochs
        batch: list[Example] = []
        first, epoch = step * size, 0
        while len(batch) < size and (epochs is None or epoch < epochs):
            sequences = self._sequences(epoch)
            batch += sequences[first : first + size - len(batch)]
            first, epoch = max(0, first - len(sequences)), epoch + 1
        return batch

    def _sequences(self, epoch: int) -> list[Example]:
        """The sequences of one epoch, in its order."""
        if epoch not in self._packed:
            order = schedule.order(self.job.seed, epoch, len(self.examples))
            examples = [self.examples[row] for row in order]
            self._packed[epoch] = pack(examples, self.tokens_max) if self.job.packing else examples
        return self._packed[epoch]


@dataclass(frozen=True)
class Dpo:
    folder: Folder
    job: DpoJob
    pairs: Sequence[Pair]
    held_out: Sequence[Pair]

    evaluates_in_run = True

    @staticmethod
    async def read(folder: Folder, job: DpoJob, tokenizer: RowTokenizer) -> "Dpo":
        """Tokenize the rows. Raises UserError, naming the row, for one that does not fit."""

        def pairs(file: str, rows: Sequence[Row]) -> list[Pair]:
            return [_pair(tokenizer, row, f"row {n} of {file}") for n, row in enumerate(rows, 1)]

        training = await asyncio.to_thread(pairs, job.data, folder.rows)
        held_out = await asyncio.to_thread(pairs, job.evaluate.data if job.evaluate else "", folder.held_out)
        return Dpo(folder, job, training, held_out)

    @property
    def steps(self) -> int:
        return schedule.steps_of(self.job, len(self.pairs), self.job.batch.pairs)

    @property
    def runs(self) -> Sequence[RunId]:
        return [self.folder.start.run, self.folder.start.reference]

    @property
    def scores(self) -> Mapping[Round, int]:
        return {"steps": 0, "evaluations": 0}

    async def train(self, clients: RunClients, step: int) -> StepOutcome:
        """The mean over the batch's pairs."""
        total = None if self.job.epochs is None else len(self.pairs) * self.job.epochs
        rows = schedule.rows(self.job.seed, step, self.job.batch.pairs, len(self.pairs), total)
        batch = [self.pairs[row] for row in rows]
        preferences = await self._preferences(clients, batch)
        data = [
            example.datum(sign * preferred.weight / len(batch))
            for pair, preferred in zip(batch, preferences, strict=True)
            for example, sign in zip(pair, (1.0, -1.0), strict=True)
        ]
        await clients.run.forward_backward(data, "cross_entropy", {})
        values = schedule.adamw(self.job.optimizer, step, self.steps)
        stepped = await clients.run.optim_step(values)
        more = {"learning_rate": values.learning_rate, "grad_norm": stepped["grad_norm"]}
        return StepOutcome({**_metrics(preferences), **more})

    async def evaluate(self, clients: RunClients, _version: int) -> StepOutcome:
        return StepOutcome(_metrics(await self._preferences(clients, self.held_out)))

    async def _preferences(self, clients: RunClients, pairs: Sequence[Pair]) -> list[Preference]:
        examples = [example for pair in pairs for example in pair]
        reference = await _summed(clients.reference, examples)
        policy = await _summed(clients.run, examples)
        both = list(zip(policy, reference, strict=True))
        return [preference(self.job.beta, both[at], both[at + 1]) for at in range(0, len(both), 2)]


def _example(tokenizer: RowTokenizer, job: SftJob, row: Row, where: str) -> Example:
    assert isinstance(row, ChatRow | CompletionRow)
    try:
        return tokenizer.sft(row, job.loss_on)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _pair(tokenizer: RowTokenizer, row: Row, where: str) -> Pair:
    assert isinstance(row, PairRow)
    try:
        return tokenizer.pair(row)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


async def _summed(client: RunClient, examples: Sequence[Example]) -> list[float]:
    data = [example.datum(1.0) for example in examples]
    output = await client.forward_backward(data, "cross_entropy", {}, forward_only=True)
    return [summed(example, each["logprobs"]) for example, each in zip(examples, output.outputs, strict=True)]


def _metrics(preferences: Sequence[Preference]) -> dict[str, float]:
    return {
        "loss/mean": sum(each.loss for each in preferences) / len(preferences),
        "margin/mean": sum(each.margin for each in preferences) / len(preferences),
        "accuracy/mean": sum(each.right for each in preferences) / len(preferences),
        "pairs": float(len(preferences)),
    }
