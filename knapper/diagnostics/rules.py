"""When a step is an alarm, and the sentence that its user gets. Limits: docs/decisions/0038-when-to-raise-an-alarm.md.

Off-policy training alone raises none: epochs over one batch, minibatches of it, and rollouts that began while the
trainer was at work are what asynchronous and PPO loops are made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from knapper.state.journal.records import Drawn

KL_LIMIT: Final = 0.01  # mean k2 a token between equal weights; what computing in another order makes is far below
KL_EXACT: Final = 1e-4  # and where the cause is known besides: above rounding, so that it matters
KNOWN_SHARE: Final = 0.9  # of a step's datums that have to be known before anything is said of all
SILENT_GROUPS: Final = 16  # in a row; if half of all groups are degenerate by chance, so many are once in 65,536 times
RATE_FACTOR: Final = 2.0  # a resumed run goes on with about the learning rate that it had; a new stage warms up


@dataclass(frozen=True)
class Load:
    """Weights that took the place of the run's own, at its creation or later."""

    seq: int
    run: str  # that saved them
    saved_at: int  # the operation that saved them
    step: int
    with_optimizer: bool
    resumable: bool  # the checkpoint has the state of the optimizer


@dataclass(frozen=True)
class Step:
    """An optimizer step and the passes that it used. `drawn`: with the age of the weights in updates, None if unknown.

    `kl`: the mean k2 of a sampled token. `repeats`: the earlier step that trained on exactly this data.
    `silent_groups`: groups in a row, the step's own last, whose completions all have an advantage of 0.
    """

    run: str
    seq: int
    step: int
    losses: frozenset[str]
    passes: int
    kl: float | None = None
    sampled: int = 0
    drawn: Sequence[tuple[Drawn, int | None]] = ()
    declared: int = 0
    learning_rate: float = 0.0
    repeats: int | None = None
    doubled_pass: bool = False
    regular: bool = False  # every earlier round of samples was trained on once
    contained: bool = False  # the repeated step is the last one in the weights that were loaded
    silent_groups: int = 0
    load: Load | None = None  # since the step before
    before: "Before | None" = None  # what the loaded weights were trained with
    own: frozenset[str] = field(default_factory=frozenset)  # digests of weights that this run began from

    @property
    def known(self) -> int:
        return sum(drawn.datums for drawn, _ in self.drawn)


@dataclass(frozen=True)
class Before:
    """The newest step of the run whose weights were loaded."""

    losses: frozenset[str]
    learning_rate: float


def alarms(step: Step) -> dict[str, str]:
    """name -> sentence, of all that is wrong with the step."""
    found = {"doubled_step": doubled(step), "fresh_optimizer": fresh_optimizer(step), "repeated_data": repeated(step)}
    found |= {"other_adapter": other_adapter(step), "degenerate_groups": degenerate(step)}
    if not found["other_adapter"]:
        found["stale_sampler"] = stale_sampler(step)
        found["wrong_temperature"] = wrong_temperature(step)
        if not found["wrong_temperature"]:
            found["sampler_trainer_mismatch"] = mismatch(step)
    return {name: sentence for name, sentence in found.items() if sentence}


def doubled(step: Step) -> str:
    if step.passes == 0 and step.load is None:
        return (
            f"optim_step was applied twice: step {step.step} has no forward_backward since the step before, so that "
            "only momentum moved the weights. Call optim_step once after each batch, and do not repeat one that "
            "succeeded; the state before it is in your newest checkpoint"
        )
    if step.doubled_pass:
        return (
            f"step {step.step} was given the same data twice before one optim_step, which doubles its gradient. Send "
            "each batch with one forward_backward, and do not repeat one that succeeded"
        )
    if step.repeats is not None and step.regular and step.load is None:
        return (
            f"step {step.step} trained on exactly the data of step {step.repeats}, while every batch before was used "
            "once: a step is doubled. Look for a retry around forward_backward and optim_step (the SDK retries by "
            "itself), and go on from a checkpoint before it"
        )
    return ""


def repeated(step: Step) -> str:
    if step.load is None or step.repeats is None or not step.contained:
        return ""
    return (
        f"step {step.step} trained on exactly the data of step {step.repeats}, which the checkpoint that was loaded "
        "contains already. Go on with the batch after it: store the number of the next batch beside the checkpoint"
    )


def fresh_optimizer(step: Step) -> str:
    load, before = step.load, step.before
    if load is None or load.with_optimizer or not load.resumable or load.step == 0 or before is None:
        return ""
    rates = sorted((step.learning_rate, before.learning_rate))
    if step.losses != before.losses or rates[1] > RATE_FACTOR * rates[0]:
        return ""  # another stage of training
    return (
        f"the run goes on from a checkpoint of step {load.step} with a fresh optimizer: its moments are zero again, "
        "and the first steps are larger than they were. To resume, load it with "
        "create_training_client_from_state_with_optimizer (or load_state_with_optimizer). If a new stage begins here, "
        "all is well"
    )


def other_adapter(step: Step) -> str:
    others = [drawn for drawn, _ in step.drawn if drawn.run and drawn.run != step.run and drawn.digest not in step.own]
    count = sum(drawn.datums for drawn in others)
    if not count or 2 * count < step.known:
        return ""
    other = max(others, key=lambda drawn: drawn.datums)
    return (
        f"{_of(count, step)} of step {step.step} were drawn by another adapter: that of {other.run}, step "
        f"{other.step}. Sample with a client of this run: save_weights_and_get_sampling_client of the training client "
        f"of {step.run}"
    )


def degenerate(step: Step) -> str:
    if step.silent_groups < SILENT_GROUPS:
        return ""
    return (
        f"step {step.step} learned nothing: in the last {step.silent_groups} groups all completions of a prompt have "
        "the same reward, so that every advantage is 0. Look at some completions beside their rewards: is the answer "
        "found where the reward looks for it, are completions cut at max_tokens, are the prompts far too hard or too "
        "easy?"
    )


def stale_sampler(step: Step) -> str:
    if not _well_known(step) or any(drawn.overdue < drawn.datums for drawn, _ in step.drawn):
        return ""
    ages = [age for _, age in step.drawn if age is not None]
    oldest = max(ages, default=0)
    if oldest <= step.declared:
        return ""
    base = all(not drawn.run for drawn, _ in step.drawn)
    who = "the base model, without this run's adapter," if base else f"weights that are {oldest} updates old"
    return (
        f"{_of(step.known, step)} of step {step.step} were drawn by {who} while newer ones were there and nothing was "
        "being trained: the sampler is stale. Make a new sampling client after each optim_step "
        "(save_weights_and_get_sampling_client). If this is meant, say so when you create the run: "
        f"user_metadata={{'staleness': '{oldest}'}}"
    )


def wrong_temperature(step: Step) -> str:
    warped = [drawn for drawn, _ in step.drawn if drawn.temperature != 1.0 or drawn.truncated]
    count = sum(drawn.datums for drawn in warped)
    if not count or not step.kl or step.kl <= KL_EXACT or 2 * count < step.known:
        return ""
    one = warped[0]
    how = f"temperature {one.temperature:g}" if one.temperature != 1.0 else "top_k or top_p"
    return (
        f"{_of(count, step)} of step {step.step} were drawn with {how}, and the trainer computes the model's own "
        f"distribution: they differ by {step.kl:.2g} nats a token (k2), so that ratios are off before anything is "
        "learned. Sample with temperature=1.0, and without top_k and top_p"
    )


def mismatch(step: Step) -> str:
    ages = [age for _, age in step.drawn]
    fresh = _well_known(step) and all(age == 0 for age in ages)
    if not fresh or step.kl is None or step.kl <= KL_LIMIT:
        return ""
    return (
        f"sampler and trainer differ by {step.kl:.2g} nats a token (k2) at step {step.step}, although both had the "
        f"same weights; expected: below {KL_LIMIT:g}. Look at what lies between: were tokens or log-probabilities "
        "changed, shifted or cut after they were drawn? If not, tell the operator: "
        f"{', '.join(sorted({drawn.sampler for drawn, _ in step.drawn if drawn.sampler})) or 'the sampler'} computes "
        "otherwise than the trainer"
    )


def _well_known(step: Step) -> bool:
    return step.sampled > 0 and step.known >= KNOWN_SHARE * step.sampled


def _of(count: int, step: Step) -> str:
    return f"all {count} rollouts" if count == step.sampled else f"{count} of {step.sampled} rollouts"
