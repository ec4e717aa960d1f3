"""Every loss, its value and its gradient, against transformers and peft over the adapter that the server exported."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file
from tinker import types

from tests.conformance import data, reference
from tests.conformance.conftest import NewClient, Trained, exported
from tests.conformance.reference import Reference, Standard
from tests.conformance.server import Dtype, Server
from tests.nearness import expect_near

pytestmark = pytest.mark.timeout(60)

LENGTHS = (19, 33, 7)
LOG_RATIOS = (-1.2, -0.5, 0.0, 0.6, 1.0)  # those of the thresholds: -0.69, -0.36, -0.22, -0.11, 0.10, 0.18, 0.26, 1.39
ADAM = types.AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.5)
Batch = list[types.Datum]
rng = np.random.default_rng


def negative_weights() -> Batch:
    batch = data.batch(rng(11), LENGTHS)
    assert any(min(datum.loss_fn_inputs["weights"].data) < 0 for datum in batch)
    return batch


def columns() -> Batch:
    """(N, 3) targets, dense."""
    dice = rng(12)
    return [
        types.Datum(
            model_input=data.prompt(dice, n),
            loss_fn_inputs={
                "target_tokens": dice.integers(0, data.vocabulary, (n, 3)),
                "weights": dice.normal(size=(n, 3)).astype(np.float32),
            },
        )
        for n in LENGTHS
    ]


def sparse() -> Batch:
    """(N, 16) targets of which one in ten is there: the SDK sends them as CSR."""
    dice = rng(13)
    batch = []
    for n in LENGTHS:
        there = dice.random((n, 16)) < 0.1
        targets = torch.from_numpy(dice.integers(1, data.vocabulary, (n, 16)) * there)
        weights = torch.from_numpy((dice.normal(size=(n, 16)) * there).astype(np.float32))
        inputs: dict[str, Any] = {"target_tokens": targets, "weights": weights}
        batch.append(types.Datum(model_input=data.prompt(dice, n), loss_fn_inputs=inputs))
    assert all(each.sparse_crow_indices is not None for datum in batch for each in datum.loss_fn_inputs.values())
    return batch


def unweighted(batch: Batch) -> Batch:
    """Without weights: each token weighs 1."""
    for datum in batch:
        del datum.loss_fn_inputs["weights"]
    return batch


def weights(dice: np.random.Generator, n: int) -> np.ndarray:
    """Some negative, some zero, none the same."""
    return np.where(np.arange(n) % 4 == 1, 0.0, dice.normal(size=n))


def sampled(**more: Callable[[np.random.Generator, int], np.ndarray]) -> Callable[[Reference], Batch]:
    """Texts whose sampler was somewhat off the learner: ratios far on both sides of 1. `more`: further inputs.

    No ratio is near a threshold of a case: there bfloat16 decides which side it is on, and the step is another one.
    """

    def make(learner: Reference) -> Batch:
        dice = rng(14)
        batch = []
        for n in LENGTHS:
            text = data.weighted(data.tokens(dice, n + 1))
            with torch.no_grad():
                p = learner.logprobs(text).numpy()
            inputs: dict[str, Any] = {
                "target_tokens": text.loss_fn_inputs["target_tokens"],
                "logprobs": (p - dice.choice(LOG_RATIOS, n) + dice.normal(size=n) * 0.01).astype(np.float32),
                "advantages": (dice.normal(size=n) * (np.arange(n) > 2)).astype(np.float32),
                **{name: values(dice, n).astype(np.float32) for name, values in more.items()},
            }
            batch.append(types.Datum(model_input=text.model_input, loss_fn_inputs=inputs))
        return batch

    return make


CASES: dict[str, tuple[str, Mapping[str, float], Callable[[Reference], Batch]]] = {
    "cross_entropy with negative weights": ("cross_entropy", {}, lambda _: negative_weights()),
    "cross_entropy of several targets": ("cross_entropy", {}, lambda _: columns()),
    "cross_entropy of sparse targets": ("cross_entropy", {}, lambda _: sparse()),
    "cross_entropy without weights": ("cross_entropy", {}, lambda _: unweighted(negative_weights())),
    "cross_entropy of several targets without weights": ("cross_entropy", {}, lambda _: unweighted(columns())),
    "importance_sampling": ("importance_sampling", {}, sampled()),
    "importance_sampling with weights": ("importance_sampling", {}, sampled(weights=weights)),
    "ppo": ("ppo", {}, sampled()),
    "ppo with weights": ("ppo", {}, sampled(weights=weights)),
    "ppo with its thresholds": ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1}, sampled()),
    "ppo with a threshold for each token": (
        "ppo", {"clip_low_threshold": 0.7},
        sampled(clip_high_threshold=lambda dice, n: 1.0 + dice.random(n)),
    ),
    "cispo": ("cispo", {}, sampled()),
    "cispo with weights": ("cispo", {}, sampled(weights=weights)),
    "cispo with its thresholds": ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.3}, sampled()),
    "dro": ("dro", {}, sampled()),
    "dro with weights": ("dro", {}, sampled(weights=weights)),
    "dro with its beta": ("dro", {"beta": 0.7}, sampled()),
    "gspo": (
        "gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        sampled(sequence_ratio_mask=lambda _, n: np.arange(n) % 2 == 0),
    ),
    "gspo with weights": (
        "gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        sampled(sequence_ratio_mask=lambda _, n: np.arange(n) % 2 == 0, weights=weights),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_loss_and_its_step_are_those_of_transformers_and_peft(
    case: str,
    service: tinker.ServiceClient,
    server: Server,
    model: Path,
    dtype: Dtype,
    trained: Trained,
    tmp_path: Path,
) -> None:
    """In bfloat16 a loss is still the formula over the log-probabilities that were told, to float32's last digits."""
    name, config, make = CASES[case]
    standard = Standard(model, trained.directory, dtype)
    batch = make(standard.truth)
    client = service.create_training_client_from_state(trained.path).result()
    scored = client.forward(batch, name, dict(config)).result()  # type: ignore[arg-type]
    output = client.forward_backward(batch, name, dict(config)).result()  # type: ignore[arg-type]
    client.optim_step(ADAM).result()
    stepped = load_file(
        exported(server, client.save_state("stepped").result().path, tmp_path) / "adapter_model.safetensors"
    )

    standard.expect(data.all_logprobs(output), lambda learner: learner.all_logprobs(batch))
    told = [torch.from_numpy(each) for each in data.logprobs(output)]
    total = sum(reference.loss(name, datum, p, config).item() for datum, p in zip(batch, told, strict=True))
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert scored.metrics["loss:sum"] == output.metrics["loss:sum"]
    assert data.bits(scored) == data.bits(output)
    truth, peer = standard.both(lambda learner: step_of(learner, batch, name, config))
    assert stepped.keys() == truth.keys()
    before = load_file(trained.directory / "adapter_model.safetensors")
    expect_near(*(flat(each, truth) for each in (stepped, truth, peer)), what="the weights after the step")
    assert float((flat(stepped, truth) - flat(before, truth)).abs().max()) > 5e-4, "the step was too small to compare"


def step_of(learner: Reference, batch: Batch, name: str, config: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The weights after the step."""
    parameters = learner.trainable()
    adam = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for datum in batch:
        reference.loss(name, datum, learner.logprobs(datum), config).backward()
    assert float(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)) > 0.5, "clipping was not tried"
    adam.step()
    return {matrix: each.detach() for matrix, each in parameters.items()}


def flat(weights: Mapping[str, torch.Tensor], names: Iterable[str]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in names])


@pytest.mark.parametrize("make", [negative_weights, columns, sparse, lambda: unweighted(columns())])
def test_cross_entropy_tells_the_loss_of_each_token(make: Callable[[], Batch], client: tinker.TrainingClient) -> None:
    """-logprobs * weights, float32, in the shape of the weights; they add up to the loss. Of a forward pass too."""
    batch = make()
    for output in (client.forward_backward(batch, "cross_entropy"), client.forward(batch, "cross_entropy")):
        found = output.result()
        total = 0.0
        for datum, told in zip(batch, found.loss_fn_outputs, strict=True):
            p = told["logprobs"].to_numpy()
            wanted = -p if "weights" not in datum.loss_fn_inputs else -p * datum.loss_fn_inputs["weights"].to_numpy()
            loss = told["elementwise_loss"].to_numpy()
            assert loss.dtype == np.float32
            assert loss.shape == p.shape
            np.testing.assert_array_equal(loss, wanted)
            total += float(loss.sum(dtype=np.float64))
        assert total == pytest.approx(found.metrics["loss:sum"], rel=1e-5, abs=1e-4)
        assert total != 0


def test_clients_that_read_json_are_told_the_loss_of_each_token_too(server: Server, model: Path) -> None:
    """Clients up to 0.24 send JSON and read it."""
    text = data.tokens(rng(16), 9)
    tensors = {
        "target_tokens": {"data": text[1:], "dtype": "int64", "shape": [8]},
        "weights": {"data": [0.0, 0.5, -1.0, 2.0] * 2, "dtype": "float32", "shape": [8]},
    }
    datum = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": text[:-1]}]}, "loss_fn_inputs": tensors}
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-local"}, timeout=40) as http:

        def post(path: str, body: dict[str, Any]) -> Any:
            reply = http.post(path, json=body)
            while reply.status_code == 408:
                reply = http.post(path, json=body)
            return reply.raise_for_status().json()

        session = post("create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.24.1"})["session_id"]
        made = {"session_id": session, "model_seq_id": 1, "base_model": str(model), "lora_config": {"rank": 2}}
        post("retrieve_future", {"request_id": (promise := post("create_model", made))["request_id"]})
        told = []
        for seq, path in enumerate(("forward", "forward_backward"), 1):
            asked = {f"{path}_input": {"data": [datum], "loss_fn": "cross_entropy"}}
            sent = post(path, {**asked, "model_id": promise["model_id"], "seq_id": seq})
            told.append(post("retrieve_future", {"request_id": sent["request_id"]})["loss_fn_outputs"][0])
    for each in told:
        wanted = -np.array(each["logprobs"]["data"], np.float32) * np.array(tensors["weights"]["data"], np.float32)
        assert (each["elementwise_loss"]["dtype"], each["elementwise_loss"]["shape"]) == ("float32", [8])
        np.testing.assert_array_equal(np.array(each["elementwise_loss"]["data"], np.float32), wanted)


def test_losses_are_sums_over_datums_and_tokens(new_client: NewClient) -> None:
    """The loss of twice the datums is twice the loss, exactly; that of twice the weights too."""
    client = new_client()
    batch = data.batch(rng(15), (8, 8))
    doubled = [
        data.weighted(
            [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]],
            (2 * datum.loss_fn_inputs["weights"].to_numpy()).tolist(),
        )
        for datum in batch
    ]
    once, twice, heavy = (client.forward(each, "cross_entropy").result() for each in (batch, batch * 2, doubled))
    assert twice.metrics["loss:sum"] == pytest.approx(2 * once.metrics["loss:sum"], rel=1e-6)
    assert heavy.metrics["loss:sum"] == pytest.approx(2 * once.metrics["loss:sum"], rel=1e-6)
    assert data.bits(twice) == data.bits(once) * 2
