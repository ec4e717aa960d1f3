"""The recipe of reinforcement learning: rollouts and scores become advantages, and advantages the loss's data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from knapper.errors import damaged
from knapper.ids import RunId
from knapper.jobs import advantages, policy, schedule
from knapper.jobs.bill import covered, union
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round, Start, step_name
from knapper.jobs.recipes import RunClients, StepOutcome
from knapper.jobs.rows import EpisodeSequence, RlRow, Row
from knapper.jobs.run_client import joined
from knapper.jobs.spec import RlJob
from knapper.state.job_records import Rollout, Rollouts, RolloutTurn, Scores, Spent, decode
from knapper.state.journal.records import Drawn
from knapper.store import Store, many
from knapper.wire.types import Datum


@dataclass(frozen=True)
class RolloutGroup:
    """One prompt's rollouts with their scores; `size`: bytes in the store."""

    rollouts: Rollouts
    scores: Scores
    size: int

    @property
    def rewards_G(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        return np.array([score.value for score in self.scores.scores], np.float64)

    @property
    def prompt(self) -> "np.ndarray[Any, np.dtype[np.int32]]":
        return np.frombuffer(self.rollouts.prompt_tokens, "<i4").astype(np.int32)


@dataclass(frozen=True)
class Rl:
    folder: Folder
    job: RlJob
    store: Store

    evaluates_in_run = False

    @property
    def steps(self) -> int:
        return self.job.steps

    @property
    def runs(self) -> Sequence[RunId]:
        return [self.folder.start.run]

    @property
    def scores(self) -> Mapping[Round, int]:
        return {"steps": self.job.batch.prompts, "evaluations": len(self.folder.held_out)}

    async def train(self, clients: RunClients, step: int) -> StepOutcome:
        groups = await read_groups(self.store, self.folder, "steps", step, self.job.batch.prompts)
        client = clients.run
        advantages_of = [advantages_of_group(self.job, group) for group in groups]
        sampled = sum(
            each.sampled_tokens for group in groups if not group.scores.refused for each in group.rollouts.rollouts
        )
        taught = [(group, each) for group, each in zip(groups, advantages_of, strict=True) if each.any()]
        data = [
            datum(group.prompt, rollout, advantage / sampled, masked=self.job.loss.name == "gspo")
            for group, each in taught
            for rollout, advantage in zip(group.rollouts.rollouts, each, strict=True)
        ]
        drawn = [one for group, _ in taught for one in _drawn(group)]
        metrics, pass_metrics = _described(self.job, step, groups, advantages_of), policy.Metrics()
        if data:
            values = schedule.adamw(self.job.optimizer, step, self.steps)
            stepped, pass_metrics = await policy.step(client, data, self.job.loss, values, drawn)
            metrics |= stepped
        await client.save_for_sampler(step_name(step + 1))
        readable = _readable(self.folder.rows, groups, advantages_of)
        return StepOutcome(metrics, _spent(groups), readable, pass_metrics, joined(drawn))

    async def evaluate(self, _clients: RunClients, version: int) -> StepOutcome:
        groups = await read_groups(self.store, self.folder, "evaluations", version, len(self.folder.held_out))
        rewards = [float(group.rewards_G.mean()) for group in groups if not group.scores.refused]
        metrics = {"reward/mean": float(np.mean(rewards)) if rewards else 0.0, "prompts": float(len(rewards))}
        metrics |= _parts(groups)
        return StepOutcome(metrics, _spent(groups), _readable(self.folder.held_out, groups, None))


async def read_groups(store: Store, folder: Folder, kind: Round, n: int, prompts: int) -> list[RolloutGroup]:
    """All groups of a round. Raises Corrupt if one is missing."""
    start = folder.start

    async def read_group(part: int) -> RolloutGroup:
        rollouts, scores = await find_group(store, start, kind, n, part)
        if rollouts is None or scores is None:
            name = (start.rollouts if rollouts is None else start.scores)(kind, n, part)
            raise damaged(name, "it is missing")
        return RolloutGroup(rollouts[0], scores[0], rollouts[1] + scores[1])

    return await many.each(range(prompts), read_group)


async def find_group(
    store: Store, start: Start, kind: Round, n: int, part: int
) -> tuple[tuple[Rollouts, int] | None, tuple[Scores, int] | None]:
    """The rollouts of one prompt and their scores, each with its size in the store; None for what is not there yet."""
    names = (start.rollouts(kind, n, part), start.scores(kind, n, part))
    first, second = [await store.get(name) for name in names]
    rollouts = None if first is None else (decode(first, Rollouts, names[0]), len(first))
    return rollouts, None if second is None else (decode(second, Scores, names[1]), len(second))


def advantages_of_group(job: RlJob, group: RolloutGroup) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """(G,) zeros for a group without scores."""
    if group.scores.refused:
        return np.zeros(len(group.rollouts.rollouts))
    return advantages.FORMULAS[job.advantage](group.rewards_G)


def _drawn(group: RolloutGroup) -> list[Drawn]:
    """Of each completion by which weights it was drawn; empty where that is not known."""
    drawn = group.rollouts.drawn
    return [] if drawn is None else [msgspec.structs.replace(drawn, datums=1)] * len(group.rollouts.rollouts)


def datum(prompt: "np.ndarray[Any, np.dtype[np.int32]]", rollout: Rollout, advantage: float, *, masked: bool) -> Datum:
    """Each token predicts the next one; only sampled ones have an advantage."""
    sequence = sequence_of(prompt, rollout)
    return policy.datum(sequence.tokens_T, sequence.sampled_T, sequence.logprobs_T, advantage, masked=masked)


def sequence_of(prompt: "np.ndarray[Any, np.dtype[np.int32]]", rollout: Rollout) -> EpisodeSequence:
    """The tokens as they were sampled, those of a prompt and of an environment between them."""
    after = np.frombuffer(rollout.tokens, "<i4").astype(np.int32)
    sampled_T = np.zeros(len(prompt) + len(after), np.bool_)
    for first, end in rollout.sampled if rollout.turns else [(0, len(after))]:
        sampled_T[len(prompt) + first : len(prompt) + end] = True
    logprobs_T = np.concatenate([np.zeros(len(prompt), np.float32), np.frombuffer(rollout.logprobs, "<f4")])
    return EpisodeSequence(np.concatenate([prompt, after]), sampled_T, logprobs_T)


def _described(job: RlJob, step: int, groups: Sequence[RolloutGroup], advantages_of: Sequence[Any]) -> dict[str, float]:
    """The rollouts' metrics, for metrics.jsonl."""
    used = [group for group in groups if not group.scores.refused]
    rewards = np.concatenate([group.rewards_G for group in used]) if used else np.zeros(1)
    rollouts = [rollout for group in groups for rollout in group.rollouts.rollouts]
    refused = len(groups) - len(used)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **_parts(groups),
        "tokens/mean": _mean(rollout.sampled_tokens for rollout in rollouts),
        "stopped/mean": _mean(rollout.stopped for rollout in rollouts),
        **_episodes(job, rollouts),
        "groups/refused": float(refused),
        "groups/silent": float(sum(not each.any() for each in advantages_of) - refused),
        "staleness": float(step - schedule.sampled_from(job, step)),
    }


def _episodes(job: RlJob, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of a job with an environment: turns of an episode, and the shares that its limits ended."""
    if job.environment is None:
        return {}
    return {
        "turns/mean": _mean(len(rollout.turns) for rollout in rollouts),
        "ended/turns": _mean(rollout.ended == "turns" for rollout in rollouts),
        "ended/context": _mean(rollout.ended == "context" for rollout in rollouts),
    }


def _mean(values: Iterable[float]) -> float:
    """0 of none: all groups were refused before anything was sampled."""
    return float(np.mean(found)) if (found := list(values)) else 0.0


def _parts(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means of the reward's terms, where it has several."""
    scores = [score for group in groups for score in group.scores.scores]
    labels = sorted({label for score in scores for label in score.parts})
    if len(labels) < 2:
        return {}
    return {f"reward/{label}": float(np.mean([score.parts[label] for score in scores])) for label in labels}


def _spent(groups: Sequence[RolloutGroup]) -> Spent:
    return Spent(
        prompt_tokens=sum(group.rollouts.prefilled or len(group.prompt) for group in groups),
        sampled_tokens=sum(rollout.sampled_tokens for group in groups for rollout in group.rollouts.rollouts),
        sample_device_s=sum(group.rollouts.device_s for group in groups),
        sample_s=covered([span for group in groups for span in group.rollouts.worked]),
        reward_s=covered([span for group in groups for span in group.scores.worked]),
        bytes=sum(group.size for group in groups),
        busy=union([span for group in groups for each in (group.rollouts, group.scores) for span in each.worked]),
    )


def _readable(rows: Sequence[Row], groups: Sequence[RolloutGroup], advantages_of: Sequence[Any] | None) -> bytes:
    """JSON Lines, one rollout per line: its prompt, its completion and its reward."""
    lines = []
    for n, group in enumerate(groups):
        row = rows[group.rollouts.row]
        assert isinstance(row, RlRow)
        if not group.rollouts.rollouts:
            refused = {"prompt": row.prompt, "completion": "", "answer": row.answer, "tokens": 0, "stopped": False}
            lines.append(msgspec.json.encode({**refused, "refused": group.scores.refused}) + b"\n")
        for m, rollout in enumerate(group.rollouts.rollouts):
            line: dict[str, Any] = {"id": rollout.id, "prompt": row.prompt, "completion": rollout.text}
            line |= {"answer": row.answer, "tokens": rollout.sampled_tokens, "stopped": rollout.stopped}
            if rollout.turns:
                line |= {"turns": [_turn(turn) for turn in rollout.turns], "ended": rollout.ended}
            if group.scores.refused:
                line["refused"] = group.scores.refused
            else:
                score = group.scores.scores[m]
                line |= {"reward": score.value, "parts": score.parts}
                if score.reasons:
                    line["reasons"] = score.reasons
            if advantages_of is not None:
                line["advantage"] = float(advantages_of[n][m])
            lines.append(msgspec.json.encode(line) + b"\n")
    return b"".join(lines)


def _turn(turn: RolloutTurn) -> dict[str, Any]:
    return {"completion": turn.completion, "messages": msgspec.Raw(turn.messages or b"[]"), "reward": turn.reward}
