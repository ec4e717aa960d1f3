"""A server on trial: its clients, the checks, and what each of them found.

A check calls the SDK as a user would and returns what it saw. It raises Violation for what the protocol does not allow;
what the server refuses or never answers is found out here.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, get_args

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types

Group = Literal["methods", "semantics", "exactness", "durability", "speed"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
Outcome = Literal["passed", "failed", "missing", "not tried", "measured"]
Floats = NDArray[np.float64]

_MISSING: Final = (404, 405, 501)  # HTTP: the server has no such call
_KEPT_S: Final = 3600  # what the referee saves expires after this
_TOKENS: Final = (5, 256)  # of random texts: every model's vocabulary has these


class Violation(Exception):
    """The server answers, and not as it should."""


class NotTried(Exception):
    """The check needs what it was not given."""


@dataclass(frozen=True)
class Observation:
    """What a check saw. `figures`: by name, as they are compared between servers."""

    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ruling:
    group: Group
    name: str
    outcome: Outcome
    seen: str
    figures: Mapping[str, float]
    seconds: float


@dataclass
class Court:
    """`tolerance`: of log-probabilities that should be equal, in nats. `kill`: ends the server, which then comes back.

    `now`: monotonic seconds.
    """

    url: str
    key: str
    model: str
    now: Callable[[], float]
    tolerance: float = 0.02
    patience_s: float = 120.0  # for one check
    kill: Callable[[], None] | None = None

    @cached_property
    def service(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=self.key)

    @cached_property
    def state(self) -> str:
        """The saved weights of `trained`."""
        return self.saved("referee-weights")

    def saved(self, name: str) -> str:
        """The path of what `trained` is now; it expires by itself."""
        return str(self.trained.save_state(name, ttl_seconds=_KEPT_S).result().path)

    def resumed(self) -> tinker.TrainingClient:
        """A run with the weights of `trained`, whose gradients and optimizer are its own."""
        return self.service.create_training_client_from_state(self.state).result()

    @cached_property
    def rest(self) -> tinker.RestClient:
        return tinker.RestClient(base_url=self.url, api_key=self.key)

    def run(self, seed: int = 1) -> tinker.TrainingClient:
        """A new run; two of the same seed begin alike."""
        return self.service.create_lora_training_client(self.model, rank=8, seed=seed).result()

    @cached_property
    def trained(self) -> tinker.TrainingClient:
        """A run whose adapter is no longer nothing."""
        training = self.run(seed=2)
        for _ in range(2):
            step(training, texts(3))
        return training

    @cached_property
    def sampler(self) -> tinker.SamplingClient:
        """Of the weights that `trained` has."""
        return self.trained.save_weights_and_get_sampling_client().result()

    @cached_property
    def base(self) -> tinker.SamplingClient:
        return self.service.create_sampling_client(base_model=self.model).result()


Call = Callable[[Court], Observation]


@dataclass(frozen=True)
class Check:
    group: Group
    name: str
    call: Call


CHECKS: Final[list[Check]] = []


def check(group: Group, name: str) -> Callable[[Call], Call]:
    """Add a check; `name` says what holds if it passes."""

    def add(call: Call) -> Call:
        CHECKS.append(Check(group, name, call))
        return call

    return add


def tried(court: Court, checks: list[Check]) -> Iterator[Ruling]:
    """What each check found, one after another."""
    for each in checks:
        began = court.now()
        outcome, seen = _within(court, each.call)
        if outcome == "passed" and each.group == "speed":
            outcome = "measured"
        yield Ruling(each.group, each.name, outcome, seen.text, seen.figures, court.now() - began)


def _within(court: Court, call: Call) -> tuple[Outcome, Observation]:
    """In a thread of its own: the SDK waits for ever for a server that does not answer."""
    answers: queue.Queue[tuple[Outcome, Observation]] = queue.Queue()

    def judge() -> None:
        answers.put(_judged(court, call))

    threading.Thread(target=judge, daemon=True).start()
    try:
        return answers.get(timeout=court.patience_s)
    except queue.Empty:
        return "failed", Observation(f"no answer within {court.patience_s:.0f} s")


def _judged(court: Court, call: Call) -> tuple[Outcome, Observation]:
    try:
        return "passed", call(court)
    except Violation as wrong:
        return "failed", Observation(str(wrong))
    except NotTried as reason:
        return "not tried", Observation(str(reason))
    except tinker.APIStatusError as error:
        outcome: Outcome = "missing" if error.status_code in _MISSING else "failed"
        return outcome, Observation(f"HTTP {error.status_code}: {error.message[:200]}")
    except Exception as error:  # noqa: BLE001  # whatever the SDK raises is the server's answer to this check
        return "failed", Observation(f"{type(error).__name__}: {str(error)[:200]}")


# ---- data


def text(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng([length, seed]).integers(*_TOKENS, length).tolist()
    return tokens


def datum(tokens: list[int], **inputs: object) -> types.Datum:
    """Next-token prediction, with more inputs than the targets."""
    given = {"target_tokens": tokens[1:], **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=given)  # type: ignore[arg-type]  # its validators take lists


def texts(count: int, length: int = 24, seed: int = 0) -> list[types.Datum]:
    """For cross_entropy, each token with weight 1."""
    return [datum(text(length + n, seed + n), weights=[1.0] * (length + n - 1)) for n in range(count)]


def logprobs(output: types.ForwardBackwardOutput) -> Floats:
    """Of all targets of all datums, one after another."""
    return np.concatenate(
        [np.asarray(each["logprobs"].tolist(), np.float64).ravel() for each in output.loss_fn_outputs]
    )


def loss(output: types.ForwardBackwardOutput) -> float:
    return float(output.metrics["loss:sum"])


def forward(training: tinker.TrainingClient, data: list[types.Datum]) -> Floats:
    """The log-probabilities that the run gives the targets now."""
    return logprobs(training.forward(data, "cross_entropy").result())


def step(training: tinker.TrainingClient, data: list[types.Datum], learning_rate: float = 1e-3) -> None:
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=learning_rate)).result()


# ---- comparisons


def apart(one: Floats, other: Floats) -> float:
    """The largest difference; infinite for other lengths, and for what is no number."""
    if one.shape != other.shape:
        return float("inf")
    difference = float(np.abs(one - other).max(initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def shown(difference: float) -> str:
    return "the same to the last bit" if difference == 0 else f"up to {difference:.2g} apart"


def expect_equal(court: Court, one: Floats, other: Floats, what: str) -> Observation:
    """Raises Violation if they are further apart than the tolerance."""
    difference = apart(one, other)
    if difference > court.tolerance:
        raise Violation(f"{what}: up to {difference:.3g} nats apart; allowed: {court.tolerance:g}")
    return Observation(f"{what}: {shown(difference)}", {"nats": difference})


def expect_same_step(before: Floats, one: Floats, other: Floats, what: str, part: float = 0.1) -> Observation:
    """Raises Violation unless two steps from the same weights came to the same, in parts of how far they went."""
    moved = float(np.linalg.norm(one - before))
    if not moved > 0:
        raise Violation(f"{what}: the step changed nothing")
    off = float(np.linalg.norm(one - other)) / moved
    if not off <= part:
        raise Violation(f"{what}: {off:.1%} of the step apart; allowed: {part:.0%}")
    return Observation(f"{what}: {off:.2%} of the step apart", {"step": off})
