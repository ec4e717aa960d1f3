"""The records of jobs: create-only msgpack objects, like the journal's."""

from array import array
from typing import Any, Literal, TypeVar

import msgspec

from knapper.state.journal.records import Drawn, Record, decode, encode
from knapper.store import Store

__all__ = [
    "Control",
    "EnvironmentAnswer",
    "EnvironmentAnswers",
    "Evaluated",
    "Record",
    "Refusal",
    "Rollout",
    "RolloutTurn",
    "Rollouts",
    "SampledTurn",
    "SampledTurns",
    "Score",
    "Scores",
    "Spent",
    "Started",
    "State",
    "Trained",
    "Trial",
    "TrialEnded",
    "Waiting",
    "decode",
    "encode",
    "read",
]  # fmt: skip

State = Literal["running", "cancelled", "failed", "completed", "deleted"]


class Started(Record, frozen=True, kw_only=True):
    """The complete job specification: everything later is a function of this and of the files."""

    v: int = 4  # 1 had no generations, 2 no source, 3 no sweep
    tenant: str
    job: str
    start: str
    generation: str
    spec_json: bytes  # knapper.jobs.spec.encode
    job_yaml: bytes
    files: dict[str, str]  # name -> sha256
    files_bytes: int
    base_model: str  # as it is served
    model: str  # its slug, which events carry
    rows: int  # of `data`
    held_out: int  # of `evaluate.data`
    started_at: float
    generations: dict[str, str] = {}  # of job.yaml and the files, in the exchange
    source: str = ""  # the bundle whose weights the adapter begins with; empty: they are drawn from lora.seed
    sweep: str = ""  # the start of the sweep that this is a trial of, which has its files; empty: of none


class Waiting(Record, frozen=True, kw_only=True):
    """job.yaml has arrived; files that it names have not."""

    since: float


class Refusal(Record, frozen=True, kw_only=True):
    """Why a job.yaml is not started: JobError.report()."""

    report: dict[str, Any]
    at: float


class Control(Record, frozen=True, kw_only=True):
    """control/<n>: a change of the job's state; without any, it runs."""

    state: State
    reason: str
    at: float


class RolloutTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was sampled in a turn, and what the environment said to it. `messages`: JSON, empty if it said nothing."""

    completion: str
    messages: bytes = b""
    reward: float = 0.0


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion, or the episode of several turns: `tokens` int32, `logprobs` float32, little-endian.

    `sampled`: [first, end) of each turn in `tokens`, between which the environment speaks, with log-probabilities of 0;
    empty: all are sampled. `ended`: by whom an episode ended: the environment (`done`), the limit of its `turns`, or
    the model's `context`; empty: it has no environment, or it was refused.
    """

    id: str
    tokens: bytes
    logprobs: bytes
    text: str  # without the stop sequence; of an episode its last turn
    stopped: bool
    sampled: list[tuple[int, int]] = []
    turns: list[RolloutTurn] = []
    ended: str = ""

    @property
    def sampled_tokens(self) -> int:
        return sum(end - first for first, end in self.sampled) if self.turns else len(self.tokens) // 4


class Rollouts(Record, frozen=True, kw_only=True):
    """All completions of one prompt of a round. `drawn`: by which weights; None where that is not known."""

    v: int = 4  # 1 had no device_s, 2 no drawn, 3 no turns
    row: int
    prompt_tokens: bytes  # int32, little-endian
    rollouts: list[Rollout]
    began_at: float
    ended_at: float
    device_s: float = 0.0  # of the device, for all of them
    drawn: Drawn | None = None
    prefilled: int = 0  # tokens of the prompts of all turns; 0: there is one turn
    busy: list[tuple[float, float]] = []  # (begin, end) of each turn; empty: there is one

    @property
    def worked(self) -> list[tuple[float, float]]:
        return self.busy or [(self.began_at, self.ended_at)]

    @property
    def prompt(self) -> list[int]:
        return array("i", self.prompt_tokens).tolist()


class Score(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    value: float
    parts: dict[str, float] = {}
    reasons: dict[str, str] = {}  # by part: why it is 0 without a comparison


class Scores(Record, frozen=True, kw_only=True):
    """Scores of one prompt's rollouts, in their order. `refused`: why the group has none."""

    v: int = 3  # 1 had no reasons, 2 no busy
    scores: list[Score]
    refused: str = ""
    began_at: float
    ended_at: float
    busy: list[tuple[float, float]] = []  # (begin, end) of each answer of environments; empty: there is none

    @property
    def worked(self) -> list[tuple[float, float]]:
        return self.busy or [(self.began_at, self.ended_at)]


class SampledTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of one rollout: `tokens` int32, `logprobs` float32, little-endian.

    `prompt`: the tokens between what was sampled before and this, int32. `message`: what was sampled, as the
    environment hears it, JSON. `overflows`: the prompt does not fit the context, and nothing was sampled.
    """

    prompt: bytes
    tokens: bytes = b""
    logprobs: bytes = b""
    text: str = ""
    message: bytes = b""
    stopped: bool = False
    overflows: bool = False


class SampledTurns(Record, frozen=True, kw_only=True):
    """What all rollouts of one prompt sampled in one turn; None where the episode was over."""

    turns: list[SampledTurn | None]
    began_at: float
    ended_at: float
    device_s: float = 0.0  # of the device, for all of them
    drawn: Drawn


class EnvironmentAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an environment said. `messages`: JSON, a text or a list; `digest`: of all of it, to compare replays by."""

    messages: bytes
    reward: float = 0.0
    done: bool = False
    digest: str


class EnvironmentAnswers(Record, frozen=True, kw_only=True):
    """What the environments of one prompt's rollouts said before a turn; None where the episode was over before.

    `tools`: JSON, in the first of them.
    """

    row: int
    answers: list[EnvironmentAnswer | None]
    tools: bytes = b""
    began_at: float
    ended_at: float


class Spent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cost of a round's rollouts. `busy`: (begin, end) of the work for them, in seconds since the epoch."""

    prompt_tokens: int = 0
    sampled_tokens: int = 0
    sample_s: float = 0.0  # wall-clock time with a sample under way
    sample_device_s: float = 0.0
    reward_s: float = 0.0
    bytes: int = 0
    busy: list[tuple[float, float]] = []


class Uncounted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples of some steps, which are counted together. `since`: when the first of them ended."""

    since: float = 0.0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    device_s: float = 0.0


class Trained(Record, frozen=True, kw_only=True):
    """A step is done: the adapter has a new version."""

    v: int = 2  # 1 had no device_s
    next_seq: int  # of the run's journal
    reference_seq: int = 1  # of the reference's
    steps: int  # of the whole job
    metrics: dict[str, float]
    tokens: int  # of the run's operations
    bytes: int  # of the records of these in the journal
    spent: Spent
    before_at: float = 0.0  # when the step before it ended
    began_at: float  # when its first operation was accepted
    ended_at: float
    device_s: float = 0.0  # of its operations; the first step includes the creation of the run
    uncounted: Uncounted = Uncounted()  # samples up to this step that `knapper usage` does not count yet


class Evaluated(Record, frozen=True, kw_only=True):
    """A version of the adapter was evaluated on the held-out data."""

    v: int = 3  # 1 had no device_s, 2 no stop
    next_seq: int
    reference_seq: int = 1
    metrics: dict[str, float]
    tokens: int
    bytes: int
    spent: Spent
    began_at: float
    ended_at: float
    device_s: float = 0.0
    stop: bool = False  # the job ends with this version: its stop_early says so


class Trial(Record, frozen=True, kw_only=True):
    """A trial of a sweep has begun. `values`: JSON, by the dotted names of the fields."""

    values: bytes
    at: float


class TrialEnded(Record, frozen=True, kw_only=True):
    """What a trial came to. `value`: of the sweep's metric; None if it has none, and `reason` says why."""

    state: Literal["completed", "failed", "cancelled", "deleted", "refused"]
    value: float | None = None
    reason: str = ""
    steps: int = 0  # done
    device_s: float = 0.0  # of its steps and evaluations
    at: float


R = TypeVar("R", bound=Record)


async def read(store: Store, name: str, kind: type[R]) -> R | None:
    """The record, or None."""
    data = await store.get(name)
    return None if data is None else decode(data, kind, name)
