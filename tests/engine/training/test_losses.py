"""Every loss and its gradient equal the formula, computed plainly from full logits."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.training import losses
from knapper.engine.training.losses import LOSSES
from knapper.errors import InvalidField, UserError

TOKENS, VOCABULARY = 50, 11
LossInputs = dict[str, Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str, columns: int = 0, *, weighted: bool = True) -> LossInputs:
    """Inputs that reach every branch: ratios on both sides of the bounds, advantages and weights of both signs and
    zero.
    """
    weights = normal(1, *((TOKENS, columns) if columns else (TOKENS,)))
    weights[::4] = 0
    if name == "cross_entropy":
        return {"weights": weights} if weighted else {}
    advantages = normal(2, TOKENS)
    advantages[::5] = 0
    loss_inputs = {"logprobs": normal(3, TOKENS) * 0.5 - 2.4, "advantages": advantages}
    if name == "gspo":
        loss_inputs["sequence_ratio_mask"] = (torch.arange(TOKENS) % 3 != 0).float()
    return loss_inputs | ({"weights": weights} if weighted else {})


def logits_and_targets(columns: int = 0) -> tuple[Tensor, Tensor]:
    shape = (TOKENS, columns) if columns else (TOKENS, 1)
    targets = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(4))
    return normal(5, TOKENS, VOCABULARY), targets


def by_loops(name: str, logits: Tensor, targets: Tensor, loss_inputs: LossInputs, config: dict[str, float]) -> Tensor:
    """Token after token, with `max` and `min` as conditions: nothing shared with the code under test."""
    total = torch.zeros(())
    normaliser = logits.exp().sum(dim=1).log()
    if name == "gspo":
        masked = [t for t in range(TOKENS) if loss_inputs["sequence_ratio_mask"][t] == 1]
        differences = [(logits[t, targets[t, 0]] - normaliser[t]).detach() - loss_inputs["logprobs"][t] for t in masked]
        sequence = math.exp(sum(float(d) for d in differences) / len(masked))
    else:
        sequence = 0.0
    for t in range(TOKENS):
        for k in range(targets.shape[1]):
            p = logits[t, targets[t, k]] - normaliser[t]
            total = total + weight_of(loss_inputs, t, k) * term(name, p, loss_inputs, t, sequence, config)
    return total


def weight_of(loss_inputs: LossInputs, t: int, k: int) -> float:
    if "weights" not in loss_inputs:
        return 1.0
    return float(loss_inputs["weights"][t] if loss_inputs["weights"].dim() == 1 else loss_inputs["weights"][t, k])


def term(name: str, p: Tensor, loss_inputs: LossInputs, t: int, sequence: float, config: dict[str, float]) -> Tensor:
    """Of one token, before its weight."""
    if name == "cross_entropy":
        return -p
    q, a = loss_inputs["logprobs"][t], loss_inputs["advantages"][t]
    ratio = (p - q).exp()
    if name == "importance_sampling":
        return -ratio * a
    if name == "dro":
        return -(p * a - config["beta"] / 2 * (p - q) * (p - q))
    if name == "cispo":
        return -min(max(ratio.item(), config["low"]), config["high"]) * p * a
    if name == "gspo":
        ratio = sequence * (p - p.detach()).exp()
    clipped = torch.tensor(min(max(ratio.item(), config["low"]), config["high"]))
    if clipped.item() == ratio.item():  # inside the bounds: the gradient passes
        clipped = ratio
    return -(ratio * a if (ratio * a).item() <= (clipped * a).item() else clipped * a)


CASES = [
    ("cross_entropy", {}, {}),
    ("importance_sampling", {}, {}),
    ("ppo", {}, {"low": 0.8, "high": 1.2}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}, {"low": 0.5, "high": 2.0}),
    ("ppo", {"clip_high_threshold": 1.5}, {"low": 0.8, "high": 1.5}),
    ("cispo", {}, {"low": 0.0, "high": 4.0}),
    ("cispo", {"clip_low_threshold": 0.6, "clip_high_threshold": 1.1}, {"low": 0.6, "high": 1.1}),
    ("dro", {}, {"beta": 0.05}),
    ("dro", {"beta": 0.7}, {"beta": 0.7}),
    ("gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, {"low": 0.9, "high": 1.1}),
    ("gspo", {"clip_low_threshold": 0.0, "clip_high_threshold": 99.0}, {"low": 0.0, "high": 99.0}),
]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("name", "config", "meaning"), CASES)
def test_value_and_gradient_equal_the_formula(
    name: str, config: dict[str, float], meaning: dict[str, float], weighted: bool
) -> None:
    """With a weight for each token, which multiplies its term whatever the loss; and without, when each weighs 1."""
    check_against_loops(name, config, meaning, inputs_of(name, weighted=weighted), 0)


@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy_takes_several_targets_a_position(weighted: bool) -> None:
    check_against_loops("cross_entropy", {}, {}, inputs_of("cross_entropy", 3, weighted=weighted), 3)


def check_against_loops(
    name: str, config: dict[str, float], meaning: dict[str, float], loss_inputs: LossInputs, columns: int
) -> None:
    raw, targets = logits_and_targets(columns)
    mine_logits, plain_logits = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    learner = torch.log_softmax(mine_logits, dim=-1).gather(1, targets)
    loss = losses.find(name)
    value, metrics, terms = loss(learner if columns else learner[:, 0], loss_inputs, loss.read_config(config))
    plain = by_loops(name, plain_logits, targets, loss_inputs, meaning)
    assert value.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-4)
    assert metrics["loss:sum"].item() == value.item()
    assert terms.shape == (targets.shape if columns else targets.shape[:1])
    assert terms.sum().item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-4)
    (mine_grad,) = torch.autograd.grad(value, mine_logits)
    (plain_grad,) = torch.autograd.grad(plain, plain_logits)
    torch.testing.assert_close(mine_grad, plain_grad, rtol=1e-4, atol=1e-6)
    assert mine_grad.abs().max() > 1e-3
    needed = torch.from_numpy(
        loss.needs_gradient(
            {
                "target_tokens": (targets if columns else targets[:, 0]).numpy(),
                **{name: value.numpy() for name, value in loss_inputs.items()},
            }
        )
    )
    assert not mine_grad[~needed].any()
    assert (~needed).any() == any(name in loss_inputs for name in loss.silent)
    assert all(key.count(":") == 1 for key in metrics)


def test_a_weight_of_zero_takes_a_token_out_however_far_its_ratio() -> None:
    """exp(-1 - -200) is infinite in float32, and 0 times that is no number."""
    learner = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss_inputs = {
        "logprobs": torch.tensor([-200.0, -2.0]),
        "advantages": torch.ones(2),
        "weights": torch.tensor([0.0, 3.0]),
    }
    for name in ("importance_sampling", "ppo", "cispo"):
        value, metrics, terms = LOSSES[name](learner, loss_inputs, {})
        (grad,) = torch.autograd.grad(value, learner)
        # ratio 1, advantage 1, weight 3; cispo's term is the log-probability times the ratio
        assert terms.tolist() == [0.0, 6.0 if name == "cispo" else -3.0]
        assert grad.tolist() == [0.0, -3.0]
        assert (metrics["tokens:sum"].item(), metrics["ratio:sum"].item(), metrics["kl:sum"].item()) == (1, 1, 0)


def test_thresholds_may_differ_by_token() -> None:
    loss_inputs, (raw, targets) = inputs_of("ppo"), logits_and_targets()
    learner = torch.log_softmax(raw, dim=-1).gather(1, targets)[:, 0]
    loss = LOSSES["ppo"]
    low, high = torch.full((TOKENS,), 0.5), torch.full((TOKENS,), 1.3)
    same, *_ = loss(learner, loss_inputs, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.3})
    each, *_ = loss(learner, {**loss_inputs, "clip_low_threshold": low, "clip_high_threshold": high}, {})
    assert each.item() == same.item()
    first = torch.arange(TOKENS) < TOKENS // 2
    low[~first], high[~first] = 0.9, 1.1
    mixed, *_ = loss(learner, {**loss_inputs, "clip_low_threshold": low, "clip_high_threshold": high}, {})
    parts = [
        loss(
            learner[half],
            {k: v[half] for k, v in loss_inputs.items()},
            {"clip_low_threshold": lo, "clip_high_threshold": hi},
        )[0]
        for half, lo, hi in ((first, 0.5, 1.3), (~first, 0.9, 1.1))
    ]
    assert mixed.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)
    assert mixed.item() != pytest.approx(same.item(), rel=1e-3)


def test_cispo_carries_no_gradient_through_the_ratio() -> None:
    """d/dp (stop_gradient(r) p A) = r A, with r = exp(-1 + 2) = e here, which the bounds leave alone."""
    learner = torch.full((4,), -1.0, requires_grad=True)
    loss_inputs = {"logprobs": torch.full((4,), -2.0), "advantages": torch.tensor([1.0, -2.0, 0.5, 0.0])}
    value, *_ = LOSSES["cispo"](learner, loss_inputs, {})
    (grad,) = torch.autograd.grad(value, learner)
    torch.testing.assert_close(grad, -math.e * loss_inputs["advantages"])


def test_metrics_are_sums_over_trained_tokens() -> None:
    learner = torch.tensor([-1.0, -2.0, -3.0])
    loss_inputs = {"logprobs": torch.tensor([-1.0, -2.5, 0.0]), "advantages": torch.tensor([1.0, 1.0, 0.0])}
    metrics = LOSSES["ppo"](learner, loss_inputs, {}).metrics
    values = {name: value.item() for name, value in metrics.items()}
    assert values["tokens:sum"] == 2
    assert values["ratio:sum"] == pytest.approx(1 + math.exp(0.5))
    assert values["kl:sum"] == pytest.approx(-0.5)
    assert values["clipped:sum"] == 1
    metrics = LOSSES["cross_entropy"](learner, {"weights": torch.tensor([0.0, 2.0, -0.5])}, {}).metrics
    assert (metrics["tokens:sum"].item(), metrics["weights:sum"].item()) == (2, 1.5)
    metrics = LOSSES["cross_entropy"](learner, {}, {}).metrics
    assert (metrics["tokens:sum"].item(), metrics["weights:sum"].item()) == (3, 3)


@pytest.mark.parametrize("name", ["", "crossentropy", "CROSS_ENTROPY", "forward"])
def test_an_unknown_loss_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        InvalidField, match=rf"^loss_fn is {name!r}; allowed: cross_entropy, importance_sampling, ppo, cispo, dro, gspo"
    ):
        losses.find(name)


@pytest.mark.parametrize(
    ("name", "todo"),
    [("stable_reinforce", "not published.*importance_sampling, ppo or cispo"), ("custom", "forward_backward_custom")],
)
def test_losses_that_cannot_be_had_say_why_and_what_instead(name: str, todo: str) -> None:
    with pytest.raises(UserError, match=todo):
        losses.find(name)


@pytest.mark.parametrize(
    ("name", "config", "allowed"),
    [
        ("cross_entropy", {"beta": 1.0}, "takes no keys"),
        ("importance_sampling", {"clip_low_threshold": 0.8}, "takes no keys"),
        ("ppo", {"epsilon": 0.2}, "takes clip_low_threshold, clip_high_threshold"),
        ("dro", {"beta": -1.0}, "0 or more"),
        ("dro", {"beta": math.nan}, "finite"),
        ("dro", {"beta": math.inf}, "finite"),
        ("dro", {"beta": "0.05"}, "finite number"),
    ],
)
def test_config_keys_and_values_are_checked(name: str, config: dict[str, float | str], allowed: str) -> None:
    with pytest.raises(InvalidField, match=allowed):
        losses.find(name).read_config(config)


def test_the_registry_names_every_argument_of_every_formula() -> None:
    for loss in LOSSES.values():
        arguments = set(inspect.signature(loss.formula).parameters) - {"learner_T"}
        assert arguments == (set(loss.required) | set(loss.optional) | set(loss.config)) - {"target_tokens", "weights"}


# ---- known answers: each loss and all of its metrics, written out in numpy's float64

LEARNER = np.array([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25, -4.0, -2.0])
SAMPLER = np.array([-1.1, -1.0, -0.5, -1.2, -3.5, -0.75, -4.0, -0.5])
ADVANTAGES = np.array([1.0, -2.0, 0.5, 0.25, -1.0, 0.0, 1.0, 1.0])  # one of 1 too: it is trained as well
MASK = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
EVEN, UNEVEN = np.ones(8), np.array([1.0, 0.5, 2.0, -1.0, 0.0, 1.0, 1.0, 0.25])
RATIO = np.exp(LEARNER - SAMPLER)
SEQUENCE = np.full(8, np.exp(((LEARNER - SAMPLER) * MASK).sum() / MASK.sum()))
Answer = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]  # terms, ratios, which are clipped


def by_ratio() -> Answer:
    return -RATIO * ADVANTAGES, RATIO, None


def by_clipping(ratio: NDArray[Any], low: float, high: float) -> Answer:
    plain, clipped = ratio * ADVANTAGES, np.clip(ratio, low, high) * ADVANTAGES
    return -np.minimum(plain, clipped), ratio, clipped < plain


def by_cispo(low: float, high: float) -> Answer:
    clipped = np.clip(RATIO, low, high)
    return -clipped * LEARNER * ADVANTAGES, RATIO, clipped != RATIO


def by_distance(beta: float) -> Answer:
    return -(LEARNER * ADVANTAGES - beta / 2 * (LEARNER - SAMPLER) ** 2), RATIO, None


def bounds(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


ANSWERS: list[tuple[str, dict[str, float], Answer]] = [
    ("importance_sampling", {}, by_ratio()),
    ("ppo", {}, by_clipping(RATIO, 0.8, 1.2)),
    ("ppo", bounds(0.7, 1.4), by_clipping(RATIO, 0.7, 1.4)),
    ("cispo", {}, by_cispo(0.0, 4.0)),
    ("cispo", bounds(0.7, 1.4), by_cispo(0.7, 1.4)),
    ("dro", {}, by_distance(0.05)),
    ("dro", {"beta": 0.7}, by_distance(0.7)),
    ("gspo", bounds(0.7, 1.4), by_clipping(SEQUENCE, 0.7, 1.4)),
    ("gspo", bounds(0.9, 1.1), by_clipping(SEQUENCE, 0.9, 1.1)),
]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("weights", [None, EVEN, UNEVEN], ids=["no weights", "even", "uneven"])
@pytest.mark.parametrize(("name", "config", "answer"), ANSWERS)
def test_the_loss_its_terms_and_each_of_its_metrics_are_those_of_numpy(
    name: str, config: dict[str, float], answer: Answer, weights: NDArray[Any] | None, dtype: torch.dtype, near: float
) -> None:
    loss_inputs = {"logprobs": SAMPLER, "advantages": ADVANTAGES} | (
        {"sequence_ratio_mask": MASK} if name == "gspo" else {}
    )
    loss_inputs |= {} if weights is None else {"weights": weights}
    tensors = {key: torch.tensor(value, dtype=dtype) for key, value in loss_inputs.items()}
    learner = torch.tensor(LEARNER, dtype=dtype, requires_grad=True)
    computed = LOSSES[name](learner, tensors, config)
    weights = EVEN if weights is None else weights
    terms, ratio, clipped = answer
    trained = (weights != 0) & ((ADVANTAGES != 0) | (name == "dro"))
    expected = {
        "loss:sum": (terms * weights).sum(), "tokens:sum": trained.sum(), "weights:sum": weights.sum(),
        "ratio:sum": ratio[trained].sum(), "kl:sum": (SAMPLER - LEARNER)[trained].sum(),
    } | ({} if clipped is None else {"clipped:sum": clipped[trained].sum()})  # fmt: skip
    metrics = {key: metric.item() for key, metric in computed.metrics.items()}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert metrics["loss:sum"] == computed.total.item() == pytest.approx(expected["loss:sum"], rel=near)
    np.testing.assert_allclose(computed.terms.numpy(), terms * weights, rtol=near, atol=1e-12)
    assert computed.total.requires_grad
    assert not any(each.requires_grad for each in (computed.terms, *computed.metrics.values())), "they hold no graph"
    assert computed.metrics["tokens:sum"].dtype == torch.float32


def test_cross_entropy_is_the_weighted_sum_of_what_was_not_expected() -> None:
    learner, weights = torch.tensor(LEARNER), torch.tensor(UNEVEN)
    computed = LOSSES["cross_entropy"](learner, {"weights": weights}, {})
    metrics = {key: metric.item() for key, metric in computed.metrics.items()}
    assert metrics == pytest.approx(
        {"loss:sum": -(LEARNER * UNEVEN).sum(), "tokens:sum": 7, "weights:sum": UNEVEN.sum()}
    )
    assert LOSSES["cross_entropy"](learner, {}, {}).total.item() == pytest.approx(-LEARNER.sum())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ppo", "clip_low_threshold", 0.8), ("ppo", "clip_high_threshold", 1.2), ("cispo", "clip_low_threshold", 0.0),
        ("cispo", "clip_high_threshold", 4.0), ("dro", "beta", 0.05), ("gspo", "clip_low_threshold", None),
        ("gspo", "clip_high_threshold", None),
    ],
)  # fmt: skip
def test_the_defaults_are_those_that_are_published(name: str, key: str, value: float | None) -> None:
    assert LOSSES[name].default(key) == value


def test_what_each_loss_takes_is_what_the_protocol_says() -> None:
    sampled, both = ("target_tokens", "logprobs", "advantages"), ("clip_low_threshold", "clip_high_threshold")
    metrics = {
        name: (loss.required, loss.optional, loss.config, loss.silent, loss.columns, loss.returns_terms)
        for name, loss in LOSSES.items()
    }
    silent = ("weights", "advantages")
    assert metrics == {
        "cross_entropy": (("target_tokens",), ("weights",), (), silent, True, True),
        "importance_sampling": (sampled, ("weights",), (), silent, False, False),
        "ppo": (sampled, ("weights", *both), both, silent, False, False),
        "cispo": (sampled, ("weights", *both), both, silent, False, False),
        "dro": (sampled, ("weights",), ("beta",), ("weights",), False, False),
        "gspo": ((*sampled, "sequence_ratio_mask"), ("weights", *both), both, silent, False, False),
    }


def test_a_gradient_is_needed_where_any_column_has_a_weight() -> None:
    weights = np.array([[0.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]], np.float32)
    loss_inputs: dict[str, NDArray[Any]] = {"target_tokens": np.zeros((4, 2), np.int64), "weights": weights}
    assert LOSSES["cross_entropy"].needs_gradient(loss_inputs).tolist() == [False, True, True, True]
    loss_inputs = {"target_tokens": np.zeros(3, np.int64), "advantages": np.array([0.0, 1.0, -1.0])}
    assert LOSSES["ppo"].needs_gradient(loss_inputs).tolist() == [False, True, True]
    assert LOSSES["ppo"].needs_gradient(loss_inputs | {"weights": np.array([1.0, 0.0, 2.0])}).tolist() == [
        False,
        False,
        True,
    ]
    assert LOSSES["dro"].needs_gradient(loss_inputs).tolist() == [True] * 3


def test_a_config_is_read_as_numbers_and_zero_is_one() -> None:
    read = LOSSES["ppo"].read_config({"clip_low_threshold": 0, "clip_high_threshold": 2})
    assert read == {"clip_low_threshold": 0.0, "clip_high_threshold": 2.0}
    assert all(isinstance(value, float) for value in read.values())
    with pytest.raises(InvalidField, match=r"^loss_fn_config\['beta'\] is -0.5; allowed: a finite number, 0 or more"):
        LOSSES["dro"].read_config({"beta": -0.5})
