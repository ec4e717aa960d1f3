"""A whole run equals a plain torch + PEFT loop that starts from the run's own exported adapter."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from knapper.engine import checkpoint_format
from knapper.engine.training.losses import LOSSES
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import AdamW, Datum
from tests.engine import peft_experts
from tests.engine.runs import datum, done, request, spec, tiny_trainer
from tests.nearness import expect_near

# PEFT warns about tied heads (docs/decisions/0002) and about a base model that is not on the hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

ADAM = AdamW(learning_rate=3e-3, weight_decay=0.01, grad_clip_norm=1.0)
Request = tuple[str, dict[str, float], int]
BATCHES: list[list[Request]] = [  # of one optimizer step each: (loss, config, columns of targets)
    [("cross_entropy", {}, 0), ("cross_entropy", {}, 3)],
    [("importance_sampling", {}, 0)],
    [("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, 0), ("cross_entropy", {}, 0)],
    [("cispo", {"clip_high_threshold": 2.0}, 0)],
    [("dro", {"beta": 0.2}, 0)],
    [("gspo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}, 0)],
    [("ppo", {}, 0), ("importance_sampling", {}, 0)],
]


def plain_loss(name: str, p: Tensor, loss_inputs: dict[str, Tensor], config: dict[str, float]) -> Tensor:
    """The published formulas, written down once more."""
    if name == "cross_entropy":
        return -(loss_inputs["weights"] * p).sum()
    q, a = loss_inputs["logprobs"], loss_inputs["advantages"]
    r = (p - q).exp()
    if name == "importance_sampling":
        return -(r * a).sum()
    if name == "dro":
        return -(p * a - 0.5 * config.get("beta", 0.05) * (p - q).pow(2)).sum()
    if name == "cispo":
        low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 4.0)
        return -(r.detach().clip(low, high) * p * a).sum()
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    if name == "gspo":
        mask = loss_inputs["sequence_ratio_mask"]
        r = ((mask * (p.detach() - q)).sum() / mask.sum()).exp() * (p - p.detach()).exp()
    return -torch.min(r * a, r.clip(low, high) * a).sum()


def plain_logprobs(model: torch.nn.Module, example: Datum) -> Tensor:
    logits = model(input_ids=torch.from_numpy(example.tokens).long()[None]).logits[0].float()
    targets = torch.from_numpy(example.inputs["target_tokens"])
    columns = targets if targets.dim() == 2 else targets[:, None]
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, columns)
    return logprobs if targets.dim() == 2 else logprobs[:, 0]


def load_in_peft(
    state: RunState,
    model: Path,
    adapter: Path,
    *,
    trainable: bool = False,
    dtype: torch.dtype = torch.float32,
    auto: Any = AutoModelForCausalLM,
) -> torch.nn.Module:
    """What a user does with the export."""
    adapter.mkdir()
    for name, data in checkpoint_format.export(state, with_optimizer=False).items():
        (adapter / name).write_bytes(data)
    base = auto.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, adapter, is_trainable=trainable)
    assert isinstance(loaded, torch.nn.Module)
    return loaded


def batch(loss: str, columns: int, rng: np.random.Generator) -> list[Datum]:
    return [datum(length, loss, rng, columns=columns, prompt=length // 3) for length in (19, 33, 7)]


def arena(state: RunState, model: torch.nn.Module, of: Callable[[Tensor], Tensor | None]) -> Tensor:
    """What `of` says of PEFT's weights, in our arena's order."""
    named = {name.replace(".default", ""): of(p) for name, p in model.named_parameters()}
    ordered: list[Tensor | None] = []
    for target in state.layout.lora_targets:
        if target.experts is not None:
            ordered += peft_experts.matrices({n: one for n, one in named.items() if one is not None}, target)
        else:
            ordered += [named[name] for name in checkpoint_format.peft_names(target.module)]
    return torch.cat([each.flatten() for each in ordered if each is not None])


@pytest.mark.parametrize("kind", ["llama", "llama_untied", "qwen3", "gpt_neox", "cohere2", "vaultgemma", "phi"])
@pytest.mark.parametrize("unembed", [False, True])
def test_a_run_equals_a_plain_peft_loop(tmp_path: Path, kind: str, unembed: bool) -> None:
    trainer = tiny_trainer(tmp_path / "model", kind)
    state = trainer.create(spec(train_unembed=unembed))
    model = load_in_peft(state, tmp_path / "model", tmp_path / "adapter", trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == state.layout.numel
    adam = torch.optim.AdamW(trainable, lr=3e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.01, foreach=False)
    rng = np.random.default_rng(5)
    losses_seen = set()
    for step in (*BATCHES, *BATCHES[:3]):
        adam.zero_grad()
        for loss, config, columns in step:
            losses_seen.add(loss)
            data = batch(loss, columns, rng)
            state, output = done(trainer.forward_backward(state, request(data, loss, config)))
            total = 0.0
            for example, output_of_datum in zip(data, output.outputs, strict=True):
                p = plain_logprobs(model, example)
                loss_inputs = {name: torch.from_numpy(values) for name, values in example.inputs.items()}
                value = plain_loss(loss, p, loss_inputs, config)
                value.backward()
                total += value.item()
                np.testing.assert_allclose(output_of_datum["logprobs"], p.detach().numpy(), atol=1e-5, rtol=1e-5)
            assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-5, abs=1e-3)
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, 1.0))
        adam.step()
        state, metrics = done(trainer.optim_step(state, ADAM))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 1.0  # else clipping was not tried
        np.testing.assert_allclose(
            state.weights_P.numpy(), arena(state, model, Tensor.detach).numpy(), atol=1e-5, rtol=0
        )
    assert losses_seen == set(LOSSES)


@pytest.mark.parametrize("kind", ["llama", "llama_untied", "qwen3", "gpt_neox", "cohere2", "vaultgemma", "phi"])
def test_a_run_in_bfloat16_is_as_near_the_truth_as_peft_in_bfloat16(tmp_path: Path, kind: str) -> None:
    """Its log-probabilities and its gradients; the truth is PEFT in float32, with the same adapter."""
    trainer, rng = tiny_trainer(tmp_path / "model", kind, torch.bfloat16), np.random.default_rng(6)
    state = trainer.create(spec(train_unembed=True))
    for _ in range(3):  # until B is no longer zero, and every matrix has a gradient
        state, _ = done(trainer.forward_backward(state, request(batch("cross_entropy", 0, rng))))
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-2)))
    data = [each for _ in range(3) for each in batch("cross_entropy", 0, rng)]
    after, output = done(trainer.forward_backward(state, request(data)))
    wanted = []
    for name, dtype in (("truth", torch.float32), ("peer", torch.bfloat16)):
        model = load_in_peft(state, tmp_path / "model", tmp_path / name, trainable=True, dtype=dtype)
        logprobs = [plain_logprobs(model, example) for example in data]
        for p, example in zip(logprobs, data, strict=True):
            plain_loss("cross_entropy", p, {"weights": torch.from_numpy(example.inputs["weights"])}, {}).backward()
        wanted.append((torch.cat(logprobs), arena(state, model, lambda p: p.grad)))
    (truth, truth_P), (peer, peer_P) = wanted
    ours = torch.cat([torch.from_numpy(each["logprobs"]) for each in output.outputs])
    expect_near(ours, truth, peer, what="log-probabilities", exact=0.0)
    assert after.grads_P is not None
    expect_near(after.grads_P, truth_P, peer_P, what="gradients", exact=0.0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "cohere2"])
@pytest.mark.parametrize(
    "targets",
    [
        {"train_mlp": False},
        {"train_attn": False},
        {"train_unembed": True},
        {"train_unembed": True, "train_mlp": False, "train_attn": False},
    ],
)
def test_an_exported_adapter_gives_the_same_log_probabilities_in_peft(
    tmp_path: Path, kind: str, targets: dict[str, bool]
) -> None:
    trainer = tiny_trainer(tmp_path / "model", kind)
    state = trainer.create(spec(**targets, rank=3, alpha=5.0))
    data = batch("cross_entropy", 0, np.random.default_rng(1))
    before = done(trainer.forward_backward(state, request(data, forward_only=True)))[1]
    for _ in range(2):
        state, _ = done(trainer.forward_backward(state, request(data)))
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-2)))
    after = done(trainer.forward_backward(state, request(data, forward_only=True)))[1]
    model = load_in_peft(state, tmp_path / "model", tmp_path / "adapter")
    for example, was, output_of_datum in zip(data, before.outputs, after.outputs, strict=True):
        assert np.abs(output_of_datum["logprobs"] - was["logprobs"]).max() > 1e-2
        with torch.no_grad():
            np.testing.assert_allclose(
                output_of_datum["logprobs"], plain_logprobs(model, example).numpy(), atol=1e-5, rtol=1e-5
            )


def expect_equal_steps(
    trainer: Trainer,
    state: RunState,
    model: torch.nn.Module,
    losses: Sequence[str],
    lengths: Sequence[int],
    rng: np.random.Generator,
) -> RunState:
    """An optimizer step a loss, by us and by PyTorch on PEFT's `model`: equal log-probabilities, gradients, weights."""
    peft_experts.keep_zeros(model, state.layout.lora_targets)
    trainable = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trainable, lr=3e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.01, foreach=False)
    for loss in losses:
        adam.zero_grad()
        data = [datum(length, loss, rng, prompt=length // 3) for length in lengths]
        state, output = done(trainer.forward_backward(state, request(data, loss)))
        for example, found in zip(data, output.outputs, strict=True):
            p = plain_logprobs(model, example)
            inputs = {name: torch.from_numpy(values) for name, values in example.inputs.items()}
            plain_loss(loss, p, inputs, {}).backward()
            np.testing.assert_allclose(found["logprobs"], p.detach().numpy(), atol=1e-5, rtol=1e-5)
        gradient_P = arena(state, model, lambda p: p.grad)
        assert state.grads_P is not None
        assert (state.grads_P - gradient_P).norm() < 1e-5 * gradient_P.norm()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        adam.step()
        state, _ = done(trainer.optim_step(state, ADAM))
        moved_P = arena(state, model, Tensor.detach)
        np.testing.assert_allclose(state.weights_P.numpy(), moved_P.numpy(), atol=1e-5, rtol=0)
    return state
