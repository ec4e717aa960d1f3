"""Every way in which a forward_backward can be wrong is refused, with datum, field, value and what is allowed."""

import math
from typing import Any

import numpy as np
import pytest

from knapper import limits
from knapper.engine.models.config import ModelConfig
from knapper.engine.training.validation import check
from knapper.errors import KnapperError, TooLarge, UserError
from knapper.wire.types import Datum
from tests.engine.runs import datum, request
from tests.engine.tiny import context, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.read(tiny_model(tmp_path_factory.mktemp("model")))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def good(loss: str, length: int = 19, columns: int = 0) -> Datum:
    return datum(length, loss, rng(), columns=columns)


def changed(example: Datum, **inputs: Any) -> Datum:
    """The datum with other inputs; None removes one."""
    merged = {**example.inputs, **inputs}
    return Datum(example.tokens, {name: value for name, value in merged.items() if value is not None})


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def at(values: np.ndarray, position: Any, value: float) -> np.ndarray:
    copied = values.copy()
    copied[position] = value
    return copied


CE, PPO, GSPO = good("cross_entropy"), good("ppo"), good("gspo")
CE2 = good("cross_entropy", columns=3)
BOUNDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


@pytest.mark.parametrize(
    ("loss", "wrong", "config", "message"),
    [
        (
            "cross_entropy",
            Datum(CE.tokens[:0], CE.inputs),
            {},
            r"datum 2: model_input's length in tokens is 0; allowed: 1 to 512",
        ),
        (
            "cross_entropy",
            Datum(at(CE.tokens, 4, -1), CE.inputs),
            {},
            r"datum 2: model_input\[4\] is -1; allowed: 0 to 267",
        ),
        ("cross_entropy", Datum(at(CE.tokens, 4, 268), CE.inputs), {}, r"model_input\[4\] is 268.*vocabulary has 268"),
        (
            "cross_entropy",
            changed(CE, target_tokens=at(CE.inputs["target_tokens"], 18, 268)),
            {},
            r"target_tokens\[18\] is 268",
        ),
        (
            "cross_entropy",
            changed(CE2, target_tokens=at(CE2.inputs["target_tokens"], (5, 2), -7)),
            {},
            r"target_tokens\[5, 2\] is -7",
        ),
        (
            "cross_entropy",
            changed(CE, target_tokens=CE.inputs["target_tokens"][:17]),
            {},
            "target_tokens has 17 values but model_input has 19",
        ),
        (
            "cross_entropy",
            changed(CE, target_tokens=CE.inputs["target_tokens"].astype(np.float32)),
            {},
            "dtype.*float32.*allowed: int64",
        ),
        ("cross_entropy", changed(CE, target_tokens=np.zeros((19, 2, 2), np.int64)), {}, "shape"),
        ("cross_entropy", changed(CE, target_tokens=np.zeros((19, 0), np.int64)), {}, "shape"),
        ("cross_entropy", changed(CE, target_tokens=None), {}, "no target_tokens"),
        (
            "cross_entropy",
            changed(CE, weights=CE.inputs["weights"][:17]),
            {},
            "weights has 17 values but target_tokens has 19; they must match",
        ),
        (
            "cross_entropy",
            changed(CE2, weights=CE.inputs["weights"]),
            {},
            r"weights has shape \(19,\) but target_tokens has \(19, 3\)",
        ),
        (
            "cross_entropy",
            changed(CE, weights=np.ones(19, np.int64)),
            {},
            "weights' dtype is 'int64'; allowed: float32",
        ),
        (
            "cross_entropy",
            changed(CE, weights=at(CE.inputs["weights"], 3, math.nan)),
            {},
            r"datum 2: weights\[3\] is nan",
        ),
        (
            "cross_entropy",
            changed(CE2, weights=at(CE2.inputs["weights"], (3, 1), math.inf)),
            {},
            r"weights\[3, 1\] is inf",
        ),
        (
            "cross_entropy",
            changed(CE, mask=CE.inputs["weights"]),
            {},
            "has 'mask'; allowed for cross_entropy: target_tokens, weights",
        ),
        ("cross_entropy", CE, {"beta": 1.0}, "cross_entropy takes no keys"),
        (
            "ppo",
            changed(PPO, advantages=PPO.inputs["advantages"][:17]),
            {},
            "datum 2: advantages has 17 values but target_tokens has 19; they must match",
        ),
        ("ppo", changed(PPO, advantages=at(PPO.inputs["advantages"], 0, math.nan)), {}, r"advantages\[0\] is nan"),
        ("ppo", changed(PPO, logprobs=at(PPO.inputs["logprobs"], 9, -math.inf)), {}, r"logprobs\[9\] is -inf"),
        ("ppo", changed(PPO, logprobs=None, advantages=None), {}, "no logprobs and no advantages"),
        (
            "ppo",
            changed(PPO, target_tokens=np.zeros((19, 2), np.int64)),
            {},
            r"shape is \(19, 2\); allowed: \(N\) for ppo",
        ),
        ("ppo", PPO, {"clip_low_threshold": 1.3}, r"\(1.3, 1.2\); allowed: low not above high"),
        ("ppo", changed(PPO, clip_low_threshold=np.ones(19, np.float32)), {"clip_low_threshold": 0.5}, "given both"),
        ("ppo", changed(PPO, clip_low_threshold=at(np.ones(19, np.float32), 7, 1.5)), {}, r"at 7 is \(1.5, 1.2\)"),
        (
            "ppo",
            changed(PPO, clip_high_threshold=at(np.ones(19, np.float32), 7, -0.5)),
            {},
            r"clip_high_threshold\[7\] is -0.5",
        ),
        ("ppo", changed(PPO, clip_high_threshold=np.ones(3, np.float32)), {}, "clip_high_threshold has 3 values"),
        (
            "importance_sampling",
            changed(PPO, clip_high_threshold=np.ones(19, np.float32)),
            {},
            "has 'clip_high_threshold'; allowed",
        ),
        ("gspo", GSPO, {}, "needs clip_low_threshold.*no published default"),
        ("gspo", changed(GSPO, sequence_ratio_mask=np.zeros(19, np.float32)), BOUNDS, "0 everywhere"),
        (
            "gspo",
            changed(GSPO, sequence_ratio_mask=at(np.ones(19, np.float32), 2, 0.5)),
            BOUNDS,
            r"mask\[2\] is 0.5; allowed: 0 or 1",
        ),
        ("nothing", CE, {}, "loss_fn is 'nothing'"),
    ],
)
def test_what_is_wrong_is_named(
    model: ModelConfig, loss: str, wrong: Datum, config: dict[str, float], message: str
) -> None:
    fine = good(loss if loss in ("cross_entropy", "gspo") else "ppo")
    with pytest.raises(UserError, match=message):
        check(request([fine, fine, wrong], loss, config), model)


@pytest.mark.parametrize(
    ("loss", "example", "config"),
    [
        ("cross_entropy", CE, {}),
        ("cross_entropy", CE2, {}),
        ("cross_entropy", changed(CE, weights=-CE.inputs["weights"]), {}),
        ("cross_entropy", good("cross_entropy", length=context), {}),
        ("cross_entropy", good("cross_entropy", length=1), {}),
        ("cross_entropy", good("cross_entropy", columns=limits.target_columns_max), {}),
        ("importance_sampling", PPO, {}),
        ("ppo", PPO, {"clip_low_threshold": 1.2}),
        ("ppo", changed(PPO, clip_low_threshold=np.ones(19, np.float32)), {}),
        ("gspo", GSPO, BOUNDS),
    ],
)
def test_what_is_right_passes(model: ModelConfig, loss: str, example: Datum, config: dict[str, float]) -> None:
    loss_of, read = check(request([example], loss, config), model)
    assert (loss_of.name, read) == (loss, config)


def test_one_past_each_limit_is_refused(model: ModelConfig) -> None:
    with pytest.raises(UserError, match="513; allowed: 1 to 512, the model's context"):
        check(request([good("cross_entropy", length=context + 1)]), model)
    with pytest.raises(UserError, match=r"allowed: \(N, 1 to 64\)"):
        check(request([good("cross_entropy", columns=limits.target_columns_max + 1)]), model)
    short = good("cross_entropy", length=1)
    check(request([short] * limits.datums_per_request_max), model)
    with pytest.raises(TooLarge, match="4097 datums; allowed: 4096"):
        check(request([short] * (limits.datums_per_request_max + 1)), model)


def test_an_empty_request_is_refused(model: ModelConfig) -> None:
    with pytest.raises(UserError, match="data is"):
        check(request([]), model)


def test_every_refusal_is_the_users(model: ModelConfig) -> None:
    with pytest.raises(KnapperError) as caught:
        check(request([changed(CE, weights=f32(1.0))]), model)
    assert caught.value.category == "user"
