"""job.yaml: what a job may say. Parsing it runs no code and looks at no other file.

The comment behind a field says what it means; `docs/jobs.md` has them all, and a test that it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField, UserError
from knapper.jobs import yaml_document
from knapper.jobs.spec_part import Seed, SpecPart
from knapper.jobs.sweep import points
from knapper.jobs.sweep import spec as sweeps
from knapper.jobs.sweep.spec import SweepSpec
from knapper.jobs.yaml_document import Document, JobError
from knapper.rewards import spec as rewards
from knapper.text.suggestions import did_you_mean
from knapper.wire import json

Kind = Literal["rl", "sft", "dpo", "episodes"]
KINDS: tuple[Kind, ...] = ("rl", "sft", "dpo", "episodes")
DpoMetric = Literal["loss/mean", "margin/mean", "accuracy/mean"]
DPO_METRICS: tuple[str, ...] = get_args(DpoMetric)
Advantage = Literal["group_normalised", "group_centred"]
File = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]  # beside job.yaml
Role = Annotated[str, Meta(pattern=r"^[a-z][a-z_]{0,31}$")]
Count = Annotated[int, Meta(ge=1, le=limits.job_steps_max)]
Tokens = Annotated[int, Meta(ge=1, le=2**20)]
Factor = Annotated[float, Meta(ge=0, le=1e6)]
Unit = Annotated[float, Meta(ge=0, lt=1)]


class LoraSpec(SpecPart, frozen=True, kw_only=True):
    rank: Annotated[int, Meta(ge=1, le=limits.rank_max)] = 16
    alpha: Annotated[float, Meta(gt=0, le=1e4)] = 32.0
    seed: Seed = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False  # off: not every server loads adapters that have it

    @property
    def adapts(self) -> list[str]:
        """What of attn, mlp and unembed the adapter changes."""
        chosen = {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}
        return [part for part, wanted in chosen.items() if wanted]


class Optimizer(SpecPart, frozen=True, kw_only=True):
    """AdamW. The gradient is a mean: of tokens (sft, rl, episodes) or pairs (dpo)."""

    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Meta(ge=0, le=limits.job_steps_max)] = 0
    warmup_ratio: Unit | None = None  # of all steps, instead of warmup_steps
    final: Annotated[float, Meta(ge=0, le=1)] = 0.0  # where linear and cosine end, as a part of learning_rate
    grad_clip_norm: Factor = 1.0  # 0: off
    beta1: Unit = 0.9
    beta2: Unit = 0.95
    eps: Annotated[float, Meta(gt=0, le=1)] = 1e-12
    weight_decay: Factor = 0.0


class SamplingSpec(SpecPart, frozen=True, kw_only=True):
    max_tokens: Tokens = 256
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**20)] = -1
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=16)] = []


class RlBatch(SpecPart, frozen=True, kw_only=True):
    prompts: Annotated[int, Meta(ge=1, le=limits.job_batch_max)] = 8
    samples: Annotated[int, Meta(ge=2, le=limits.num_samples_max)] = 8


class EnvironmentSpec(SpecPart, frozen=True, kw_only=True):
    """`Environment` of a file beside job.yaml: what a rollout of several turns meets, in the sandbox."""

    code: File
    turns: Annotated[int, Meta(ge=1, le=limits.job_turns_max)] = 8  # that are sampled at most; then the episode ends
    timeout_s: rewards.Seconds = 10.0  # of all its steps in one episode


class SftBatch(SpecPart, frozen=True, kw_only=True):
    sequences: Annotated[int, Meta(ge=1, le=limits.job_batch_max)] = 8


class DpoBatch(SpecPart, frozen=True, kw_only=True):
    pairs: Annotated[int, Meta(ge=1, le=limits.job_batch_max)] = 8


class EpisodesBatch(SpecPart, frozen=True, kw_only=True):
    episodes: Annotated[int, Meta(ge=1, le=limits.job_batch_max)] = 8


class LossName(SpecPart, frozen=True, kw_only=True):
    """Not dro: it counts the prompt's tokens too, which were not sampled."""

    name: Literal["importance_sampling", "ppo", "cispo", "gspo"] = "importance_sampling"
    clip_low_threshold: Factor | None = None
    clip_high_threshold: Factor | None = None


class Evaluate(SpecPart, frozen=True, kw_only=True):
    data: File
    every: Annotated[int, Meta(ge=0, le=limits.job_steps_max)] = 0  # 0: before and after only


class RlEvaluate(Evaluate, frozen=True, kw_only=True):
    samples: Annotated[int, Meta(ge=1, le=64)] = 1
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0


class DpoEvaluate(Evaluate, frozen=True, kw_only=True):
    metric: DpoMetric = "loss/mean"  # of the best, for keep and stop_early


class StopEarly(SpecPart, frozen=True, kw_only=True):
    """Needs `evaluate`."""

    patience: Annotated[int, Meta(ge=1, le=limits.job_steps_max)] = 3  # evaluations in a row that are not better
    min_delta: Factor = 0.0  # what counts as better has to be better by more


class JobSpec(SpecPart, frozen=True, kw_only=True):
    """The fields of every kind of job."""

    data: File
    base_model: Annotated[str, Meta(max_length=limits.text_chars_max)] | None = None  # none: the only served one
    lora: LoraSpec = LoraSpec()
    init_from: Annotated[str, Meta(max_length=limits.text_chars_max)] | None = None  # tinker://...: the first weights
    optimizer: Optimizer = Optimizer()
    seed: Seed = 0  # of the data's order, and of the samples
    keep: Literal["last", "best"] = "last"  # the version whose adapter the job publishes
    stop_early: StopEarly | None = None
    sweep: SweepSpec | None = None  # the job stands for many, and this is the first of them

    @property
    def files(self) -> list[str]:
        """The files beside job.yaml that it needs, each once."""
        return list(dict.fromkeys([self.data, *self._more_files()]))

    def _more_files(self) -> list[str]:
        evaluate: Evaluate | None = getattr(self, "evaluate", None)
        return [] if evaluate is None else [evaluate.data]


class RlJob(JobSpec, frozen=True, kw_only=True):
    kind: Literal["rl"]
    steps: Count
    reward: Any = None  # knapper.rewards.spec
    environment: EnvironmentSpec | None = None  # one of the two
    batch: RlBatch = RlBatch()
    sampling: SamplingSpec = SamplingSpec()
    loss: LossName = LossName()
    advantage: Advantage = "group_normalised"
    max_staleness: Annotated[int, Meta(ge=0, le=limits.job_staleness_max)] = 0  # steps that samples may be behind
    on_reward_error: Literal["fail", "skip_group"] = "fail"
    evaluate: RlEvaluate | None = None

    def _more_files(self) -> list[str]:
        if self.environment is not None:
            return [*super()._more_files(), self.environment.code]
        return [*super()._more_files(), *rewards.names(self.reward)]


class Supervised(JobSpec, frozen=True, kw_only=True):
    """sft and dpo: passes over rows of text."""

    steps: Count | None = None
    epochs: Annotated[int, Meta(ge=1, le=1000)] | None = None
    max_tokens: Tokens | None = None  # of one sequence; none: the model's context. Longer rows are an error
    evaluate: Evaluate | None = None


class SftJob(Supervised, frozen=True, kw_only=True):
    kind: Literal["sft"]
    batch: SftBatch = SftBatch()
    packing: bool = False
    loss_on: Literal["completions", "all"] | Annotated[list[Role], Meta(min_length=1, max_length=16)] = "completions"


class DpoJob(Supervised, frozen=True, kw_only=True):
    kind: Literal["dpo"]
    batch: DpoBatch = DpoBatch()
    evaluate: DpoEvaluate | None = None
    beta: Annotated[float, Meta(gt=0, le=100)] = 0.1


class EpisodesJob(JobSpec, frozen=True, kw_only=True):
    """rl whose rollouts are there: episodes that agents had, each with its reward."""

    kind: Literal["episodes"]
    steps: Count | None = None
    epochs: Annotated[int, Meta(ge=1, le=1000)] | None = None
    max_tokens: Tokens | None = None  # of one sequence; none: the model's context. Longer ones are an error
    batch: EpisodesBatch = EpisodesBatch()
    loss: LossName = LossName()
    advantage: Advantage = "group_normalised"

    @property
    def evaluate(self) -> None:
        """Nothing is held out: what the adapter is worth, agents find out."""


AnyJob = RlJob | SftJob | DpoJob | EpisodesJob
AnyType = type[RlJob] | type[SftJob] | type[DpoJob] | type[EpisodesJob]
TYPES: dict[Kind, AnyType] = {"rl": RlJob, "sft": SftJob, "dpo": DpoJob, "episodes": EpisodesJob}


@dataclass(frozen=True)
class Parsed:
    """The job, and the lines of its fields, for errors found later.

    `jobs`: of a sweep, those that its trials can be, the first of which `job` is; else the job alone.
    """

    job: AnyJob
    document: Document
    jobs: Sequence[AnyJob]

    @property
    def files(self) -> list[str]:
        """The files beside job.yaml that it needs, each once."""
        return list(dict.fromkeys(name for job in self.jobs for name in job.files))

    def wrong(self, error: UserError) -> JobError:
        """The error of a field, with its line."""
        return _located(self.document, _of_sweep(self.job.sweep, error))


def parse(data: bytes) -> Parsed:
    """Raises JobError for the first error, with its line."""
    document = yaml_document.read(data)
    content = document.content
    if not isinstance(content, dict):
        raise JobError(1, "its content", content, "a job: kind, data, steps, ... one `field: value` a line")
    kind = content.get("kind")
    if kind not in KINDS:
        for name in content.keys() - {"kind"} if kind is None else ():
            if todo := did_you_mean(name, ["kind"]):
                raise JobError(document.line((name,)), name, content[name], "no field of this name", todo)
        todo = f"{did_you_mean(str(kind), KINDS)} Say what the job does".strip()
        raise JobError(document.line(("kind",)), "kind", kind, ", ".join(KINDS), todo)
    try:
        return _swept(document, kind) if "sweep" in content else _alone(document, kind)
    except UserError as error:
        raise _located(document, error) from error


def _alone(document: Document, kind: Kind) -> Parsed:
    job = _job(document.content, kind)
    return Parsed(job, document, [job])


def _job(content: dict[str, Any], kind: Kind) -> AnyJob:
    """Raises InvalidField."""
    job: AnyJob = json.decode(msgspec.json.encode(content), TYPES[kind])
    _check(job)
    return job


def _swept(document: Document, kind: Kind) -> Parsed:
    """Every job that the sweep can lead to is checked as if it stood alone."""
    content = document.content
    sweep = sweeps.parse(content["sweep"])
    jobs = []
    for point in points.checked(sweep):
        try:
            jobs.append(_job(points.applied(content, point), kind))
        except UserError as error:
            raise _of_sweep(sweep, error) from error
    _check_compared(jobs[0], sweep)
    return Parsed(msgspec.structs.replace(jobs[0], sweep=sweep), document, jobs)


def _of_sweep(sweep: SweepSpec | None, error: UserError) -> UserError:
    """The error of a field whose value the sweep gives."""
    if sweep is None or not isinstance(error, InvalidField) or error.field is None:
        return error
    given = [
        field for field in sweep.over if error.field == field or error.field.startswith((f"{field}.", f"{field}["))
    ]
    if not given:
        return error
    return InvalidField(f"{sweeps.OVER}.{error.field}", error.value, error.allowed, error.todo)


def _check_compared(job: AnyJob, sweep: SweepSpec) -> None:
    """Raises InvalidField unless held-out rows say which trial is the best."""
    if isinstance(job, EpisodesJob):
        raise InvalidField("sweep", "there", "none for episodes, of which nothing is held out to compare trials by")
    if job.evaluate is None:
        raise InvalidField("sweep", "there", "only beside `evaluate:`, whose held-out rows say which trial is the best")
    if isinstance(job, RlJob) and job.environment is None:
        return  # the names of its terms are known once the reward is read
    known = DPO_METRICS if isinstance(job, DpoJob) else ("reward/mean",) if isinstance(job, RlJob) else ("loss/mean",)
    if sweep.metric not in (None, *known):
        raise InvalidField("sweep.metric", sweep.metric, f"{' or '.join(known)}, of the evaluation")


def decode(data: bytes) -> AnyJob:
    """Decode what `encode` wrote."""
    kind = msgspec.json.decode(data, type=_Kinded).kind
    return msgspec.json.decode(data, type=TYPES[kind])


def encode(job: AnyJob) -> bytes:
    return msgspec.json.encode(job)


class _Kinded(msgspec.Struct):
    kind: Kind


def _check(job: AnyJob) -> None:
    """Checks across fields. Raises InvalidField."""
    if not (job.lora.train_attn or job.lora.train_mlp or job.lora.train_unembed):
        raise InvalidField("lora.train_attn", False, "at least one of train_attn, train_mlp and train_unembed is true")
    _check_warmup(job.optimizer, job.steps)
    _check_selection(job)
    if isinstance(job, RlJob | EpisodesJob):
        _check_loss(job.loss)
    if isinstance(job, RlJob):
        _check_worth(job)
        return
    if (job.steps is None) == (job.epochs is None):
        value = "both" if job.steps is not None else None
        raise InvalidField("steps", value, "one of `steps:` and `epochs:`")


def _check_worth(job: RlJob) -> None:
    if job.environment is None:
        if job.reward is None:
            raise InvalidField("reward", None, "`reward:`, or `environment:` for rollouts of several turns")
        rewards.names(job.reward)
    elif job.reward is not None:
        todo = "Add what it is worth to the rewards that the environment's `step` gives"
        raise InvalidField("reward", "there", "none beside `environment:`, whose rewards count", todo)


def _check_warmup(optimizer: Optimizer, steps: int | None) -> None:
    """`steps`: None if they follow from epochs; then a long warmup ends with the job."""
    if optimizer.warmup_ratio is not None and optimizer.warmup_steps:
        allowed = "none beside warmup_steps: one of the two"
        raise InvalidField("optimizer.warmup_ratio", optimizer.warmup_ratio, allowed)
    if steps is not None and optimizer.warmup_steps > steps:
        allowed = f"0 to {steps}, the steps of the job: a longer warmup never ends"
        raise InvalidField("optimizer.warmup_steps", optimizer.warmup_steps, allowed)


def _check_selection(job: AnyJob) -> None:
    field, value = ("stop_early", "there") if job.stop_early is not None else ("keep", job.keep)
    if value == "last":
        return
    if job.evaluate is None:
        raise InvalidField(field, value, "only beside `evaluate:`, whose held-out rows say what is best")
    if not job.evaluate.every:
        allowed = f"1 or more, beside `{field}:`: there is nothing to choose from if only the end is evaluated"
        raise InvalidField("evaluate.every", 0, allowed)


def _check_loss(loss: LossName) -> None:
    low, high = loss.clip_low_threshold, loss.clip_high_threshold
    if loss.name == "importance_sampling" and (low is not None or high is not None):
        raise InvalidField("loss.name", loss.name, "ppo, cispo or gspo with clip thresholds", "Or leave these out")
    if loss.name == "gspo" and (low is None or high is None):
        raise InvalidField("loss.clip_low_threshold", low, "a number, and clip_high_threshold too, for gspo")
    if low is not None and high is not None and low > high:
        raise InvalidField("loss.clip_low_threshold", low, f"at most clip_high_threshold, which is {high}")


def _located(document: Document, error: UserError) -> JobError:
    if isinstance(error, JobError):
        return error
    field = error.field or "job.yaml"
    line = document.line(yaml_document.path_of(field))
    if not isinstance(error, InvalidField):
        return JobError(line, field, None, "", message=str(error))
    return JobError(line, field, error.value, error.allowed, error.todo)
