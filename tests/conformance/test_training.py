"""A training client: what it is told about its run, and what its operations do to one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import NewClient, exported
from tests.conformance.data import CE
from tests.conformance.reference import Reference, Standard
from tests.conformance.server import Dtype, Server
from tests.nearness import MEAN, expect_near

pytestmark = pytest.mark.timeout(60)
rng = np.random.default_rng


def step(client: tinker.TrainingClient, batch: list[types.Datum], **adam: float) -> types.OptimStepResponse:
    client.forward_backward(batch, CE)
    return client.optim_step(types.AdamParams(**adam)).result()


def weights(client: tinker.TrainingClient, server: Server, directory: Path, name: str) -> dict[str, torch.Tensor]:
    """The adapter as it is now."""
    directory.mkdir(exist_ok=True)
    path = client.save_state(name).result().path
    return load_file(exported(server, path, directory / name) / "adapter_model.safetensors")


def test_a_client_is_told_what_it_trains(client: tinker.TrainingClient, model: Path) -> None:
    info = client.get_info()
    assert info.model_id == client.model_id
    assert info.model_data.model_name == str(model)
    assert info.lora_rank == 4
    assert info.is_lora


def test_the_tokenizer_of_a_model_directory_is_found_offline(client: tinker.TrainingClient) -> None:
    tokenizer = client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("the end and the ênd")) == "the end and the ênd"


def test_a_new_run_is_the_base_model(client: tinker.TrainingClient, model: Path, dtype: Dtype) -> None:
    batch = data.batch(rng(0))
    found = data.all_logprobs(client.forward(batch, CE).result())
    Standard(model, None, dtype).expect(found, lambda base: base.all_logprobs(batch))


def test_every_log_probability_has_its_own_target(client: tinker.TrainingClient) -> None:
    """Datums of several text chunks, of one token, and of the model's whole context."""
    text = data.tokens(rng(1), 40)
    split = types.Datum(
        model_input=types.ModelInput(
            chunks=[types.EncodedTextChunk(tokens=text[:7]), types.EncodedTextChunk(tokens=text[7:39])]
        ),
        loss_fn_inputs=data.weighted(text).loss_fn_inputs,
    )
    long = data.weighted(data.tokens(rng(2), 513))
    whole, parts, one, longest = data.logprobs(
        client.forward([data.weighted(text), split, data.weighted(text[:2]), long], CE).result()
    )
    assert whole.tobytes() == parts.tobytes()
    assert one.shape == (1,)
    assert longest.shape == (512,)
    np.testing.assert_allclose(one[0], whole[0], atol=1e-5)


def test_gradients_accumulate_until_the_step(new_client: NewClient, server: Server, tmp_path: Path) -> None:
    """Two passes of half the batch move the weights as one pass of the whole; the next step begins at zero."""
    batch = data.batch(rng(3), (12, 12, 12, 12))
    whole, halves = new_client(), new_client()
    for _ in range(2):
        step(whole, batch, learning_rate=1e-2, eps=1e-2)
        halves.forward_backward(batch[:2], CE)
        step(halves, batch[2:], learning_rate=1e-2, eps=1e-2)
    one, two = (weights(each, server, tmp_path / name, "end") for each, name in ((whole, "one"), (halves, "two")))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


def test_forward_leaves_the_gradients_alone(new_client: NewClient) -> None:
    plain, looked = new_client(), new_client()
    batch, other = data.batch(rng(4)), data.batch(rng(5))
    step(plain, batch, learning_rate=1e-2)
    looked.forward(other, CE)
    looked.forward_backward(batch, CE)
    looked.forward(other, CE)
    looked.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert data.bits(plain.forward(other, CE).result()) == data.bits(looked.forward(other, CE).result())


def test_a_step_at_learning_rate_zero_moves_nothing(
    client: tinker.TrainingClient, server: Server, tmp_path: Path
) -> None:
    step(client, data.batch(rng(6)), learning_rate=1e-2)
    before = weights(client, server, tmp_path, "before")
    step(client, data.batch(rng(61)), learning_rate=0.0, weight_decay=0.5)
    after = weights(client, server, tmp_path, "after")
    assert all(torch.equal(before[name], after[name]) for name in before)


SCHEDULE: list[dict[str, float]] = [
    {"learning_rate": 1e-2, "eps": 1e-2},
    {"learning_rate": 1e-3, "beta1": 0.5, "beta2": 0.99, "eps": 1e-1},
    {"learning_rate": 5e-3, "weight_decay": 0.5, "eps": 1e-2},
    {"learning_rate": 5e-3, "grad_clip_norm": 0.1, "eps": 1e-2},
]


def test_each_step_takes_its_own_values(
    new_client: NewClient, server: Server, model: Path, dtype: Dtype, tmp_path: Path
) -> None:
    """Learning rate, betas, eps, decay and clipping change from step to step, as torch's AdamW changes with them."""
    client = new_client()
    client.save_state("start").result()
    arenas = [weights(client, server, tmp_path, "0")]
    norms = []
    for index, values in enumerate(SCHEDULE):
        metrics = step(client, data.batch(rng(20 + index)), **values).metrics or {}
        norms.append(next(value for name, value in metrics.items() if "grad_norm" in name))
        arenas.append(weights(client, server, tmp_path, str(index + 1)))
    truth, peer = Standard(model, tmp_path / "0", dtype).both(trained_on_schedule)
    for found, norm, true, near in zip(arenas[1:], norms, truth, peer, strict=True):
        expect_near(torch.cat([found[name].flatten() for name in true.names]), true.weights_P, near.weights_P)
        # Two vectors' norms differ by no more than the vectors do.
        allowed = MEAN * float((near.grads_P - true.grads_P).norm())
        norm_of_truth = float(true.grads_P.norm())
        assert norm == pytest.approx(norm_of_truth, abs=max(1e-3 * norm_of_truth, allowed))
    assert max(float((arenas[0][name] - arenas[-1][name]).abs().max()) for name in truth[0].names) > 5e-3


@dataclass(frozen=True)
class Stepped:
    """P parameters, one matrix after another."""

    names: list[str]
    grads_P: torch.Tensor
    weights_P: torch.Tensor


def trained_on_schedule(learner: Reference) -> list[Stepped]:
    named = learner.trainable()
    adam = torch.optim.AdamW(named.values())
    found = []
    for index, values in enumerate(SCHEDULE):
        adam.zero_grad()
        for datum in data.batch(rng(20 + index)):
            (-(datum.loss_fn_inputs["weights"].to_torch() * learner.logprobs(datum)).sum()).backward()
        grads_P = torch.cat([each.grad.flatten() for each in named.values() if each.grad is not None])
        torch.nn.utils.clip_grad_norm_(named.values(), values.get("grad_clip_norm") or torch.inf)
        adam.param_groups[0].update(
            lr=values["learning_rate"],
            betas=(values.get("beta1", 0.9), values.get("beta2", 0.95)),
            eps=values["eps"],
            weight_decay=values.get("weight_decay", 0.0),
        )
        adam.step()
        found.append(Stepped([*named], grads_P, torch.cat([each.detach().flatten() for each in named.values()])))
    return found


def test_a_custom_loss_of_the_client_gives_its_gradient(new_client: NewClient) -> None:
    """The negative log-likelihood, written by the user, trains exactly as cross_entropy does; a square differs."""

    def likelihood(batch: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        loss = -sum(
            (datum.loss_fn_inputs["weights"].to_torch() * p).sum() for datum, p in zip(batch, logprobs, strict=True)
        )
        return loss, {"mine:sum": 7.0}

    def square(batch: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return sum((p**2).sum() for p in logprobs), {}

    batch = data.batch(rng(7))
    built_in, custom, other = new_client(), new_client(), new_client()
    expected = built_in.forward_backward(batch, CE).result()
    output = custom.forward_backward_custom(batch, likelihood).result()
    squared = other.forward_backward_custom(batch, square).result()
    assert output.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    assert output.metrics["mine:sum"] == 7.0
    assert squared.metrics["loss:sum"] == pytest.approx(sum((p**2).sum() for p in data.logprobs(expected)), rel=1e-4)
    for each in (built_in, custom, other):
        each.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    after, mine, others = (data.bits(each.forward(batch, CE).result()) for each in (built_in, custom, other))
    assert mine == after
    assert others != after


def test_a_traced_custom_loss_runs_on_the_client(service: tinker.ServiceClient, client: tinker.TrainingClient) -> None:
    def weighted_nll(logprobs: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nll:sum": loss}

    handle = service.create_custom_loss(weighted_nll, input_ranks={"logprobs": 1, "weights": 1}).result()
    batch = data.batch(rng(8))
    expected = client.forward(batch, CE).result().metrics["loss:sum"]
    metrics = client.forward_backward_custom(batch, handle).result().metrics
    assert metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_what_is_trained_is_what_was_asked_for(new_client: NewClient, server: Server, tmp_path: Path) -> None:
    kinds = {
        "attn": {"train_mlp": False, "train_unembed": False},
        "mlp": {"train_attn": False, "train_unembed": False},
        "unembed": {"train_attn": False, "train_mlp": False},
    }
    parts = {"attn": "self_attn", "mlp": ".mlp.", "unembed": "lm_head"}
    for name, train in kinds.items():
        found = weights(new_client(rank=2, **train), server, tmp_path / name, "new")
        assert found
        assert all(parts[name] in matrix for matrix in found)


def test_a_seed_decides_the_adapter(new_client: NewClient, server: Server, tmp_path: Path) -> None:
    one, same, other = (
        weights(new_client(seed=seed), server, tmp_path / str(index), "new") for index, seed in enumerate((5, 5, 6))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss(client: tinker.TrainingClient) -> None:
    batch = [data.weighted(data.tokens(rng(9), 20))]
    losses = []
    for _ in range(15):
        output = client.forward_backward(batch, CE)
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(output.result().metrics["loss:sum"])
    assert losses[-1] < 0.2 * losses[0]
