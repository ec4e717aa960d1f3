"""Clip thresholds for each token, of every loss that clips: against the formula, and against those of the config."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.conformance import data, reference
from tests.conformance.conftest import Trained
from tests.conformance.reference import Reference, Standard
from tests.conformance.server import Dtype

pytestmark = [
    pytest.mark.timeout(60),
    # PEFT cannot know that a deliberately untied output adapter is meant (docs/decisions/0002).
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]
LOW, HIGH = 0.75, 1.25  # floats of 32 bits, as config sends them


def batch(learner: Reference, loss: str, thresholds: str) -> list[types.Datum]:
    """`thresholds`: none, or the same for all tokens, or one a token."""
    dice = np.random.default_rng(41)
    found = []
    for n in (19, 33, 7):
        text = data.weighted(data.tokens(dice, n + 1))
        with torch.no_grad():
            p = learner.logprobs(text).numpy()
        inputs: dict[str, Any] = {
            "target_tokens": text.loss_fn_inputs["target_tokens"],
            "logprobs": (p + dice.normal(size=n) * 0.5).astype(np.float32),
            "advantages": dice.normal(size=n).astype(np.float32),
        }
        spread = dice.random((2, n))
        if thresholds == "the same":
            inputs |= {"clip_low_threshold": np.full(n, LOW, np.float32)}
            inputs |= {"clip_high_threshold": np.full(n, HIGH, np.float32)}
        if thresholds == "one a token":
            inputs |= {"clip_low_threshold": (1 - 0.1 * spread[0]).astype(np.float32)}
            inputs |= {"clip_high_threshold": (1 + 0.1 * spread[1]).astype(np.float32)}
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = (np.arange(n) % 2 == 0).astype(np.float32)
        found.append(types.Datum(model_input=text.model_input, loss_fn_inputs=inputs))
    return found


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_thresholds_of_each_token_are_those_of_the_formula(
    loss: Any, service: tinker.ServiceClient, model: Path, dtype: Dtype, trained: Trained
) -> None:
    standard = Standard(model, trained.directory, dtype)
    asked = batch(standard.truth, loss, "one a token")
    client = service.create_training_client_from_state(trained.path).result()
    output = client.forward(asked, loss).result()
    standard.expect(data.all_logprobs(output), lambda learner: learner.all_logprobs(asked))
    told = [torch.from_numpy(each) for each in data.logprobs(output)]
    wanted = sum(reference.loss(loss, datum, p, {}).item() for datum, p in zip(asked, told, strict=True))
    assert output.metrics["loss:sum"] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert output.metrics["clipped:sum"] > 0, "nothing was clipped"


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_one_threshold_for_all_tokens_trains_as_the_same_for_each(
    loss: Any, service: tinker.ServiceClient, model: Path, trained: Trained
) -> None:
    learner = Reference(model, trained.directory)
    config = {"clip_low_threshold": LOW, "clip_high_threshold": HIGH}
    after = []
    for thresholds, given in (("none", config), ("the same", None)):
        client = service.create_training_client_from_state(trained.path).result()
        client.forward_backward(batch(learner, loss, thresholds), loss, given).result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        after.append(data.bits(client.forward(data.batch(np.random.default_rng(42)), "cross_entropy").result()))
    assert after[0] == after[1]
