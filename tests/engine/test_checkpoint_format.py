"""Saves and snapshots come back bit for bit; what is broken or of another form is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from knapper.engine import checkpoint_format
from knapper.engine.checkpoint_format import ADAPTER, CONFIG, OPTIMIZER, UNTIE_FIRST, export, freeze, read, thaw
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import Corrupt, InvalidField, UserError
from knapper.wire.types import AdamW
from tests.engine.runs import datum, done, request, spec, tiny_trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def state(trainer: Trainer) -> RunState:
    """Three steps in, with gradients pending."""
    rng = np.random.default_rng(0)
    now = trainer.create(spec(train_unembed=True))
    for _ in range(3):
        now, _ = done(trainer.forward_backward(now, request([datum(20, "cross_entropy", rng)])))
        now, _ = done(trainer.optim_step(now, AdamW(learning_rate=1e-2)))
    now, _ = done(trainer.forward_backward(now, request([datum(20, "cross_entropy", rng)])))
    return now


def test_a_save_comes_back_bit_for_bit(state: RunState) -> None:
    files = export(state, with_optimizer=True)
    weights, moments = read(files, state.spec, state.layout, with_optimizer=True)
    assert moments is not None
    assert torch.equal(weights, state.weights_P)
    assert torch.equal(moments.m_P, state.moments.m_P)
    assert torch.equal(moments.v_P, state.moments.v_P)
    assert moments.step == 3
    assert state.moments.v_P.any()


def test_a_save_for_a_sampler_has_no_optimizer(state: RunState) -> None:
    files = export(state, with_optimizer=False)
    assert set(files) == {CONFIG, ADAPTER}
    weights, moments = read(files, state.spec, state.layout, with_optimizer=False)
    assert moments is None
    assert torch.equal(weights, state.weights_P)
    with pytest.raises(InvalidField, match=r"without optimizer state.*save_state"):
        read(files, state.spec, state.layout, with_optimizer=True)


def test_the_adapter_is_a_plain_safetensors_file(state: RunState, tmp_path: Path) -> None:
    path = tmp_path / ADAPTER
    path.write_bytes(export(state, with_optimizer=False)[ADAPTER])
    with safe_open(path, framework="pt") as opened:
        names = set(opened.keys())
        assert opened.metadata() == {"format": "pt", "merges": UNTIE_FIRST}
        for target, a, b in state.layout.matrices(state.weights_P):
            for name, matrix in zip(checkpoint_format.peft_names(target.module), (a, b), strict=True):
                assert torch.equal(opened.get_tensor(name), matrix)
                names.remove(name)
    assert not names


def test_the_configuration_says_what_peft_needs(state: RunState) -> None:
    config = json.loads(bytes(export(state, with_optimizer=False)[CONFIG]))
    wanted = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": 4, "lora_alpha": 8,
        "bias": "none", "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rank": 8}, "checkpoint's r is 4; allowed: 8, which this run has"),
        ({"alpha": 32.0}, "lora_alpha is 8"),
        ({"train_unembed": False}, "target_modules"),
        ({"train_mlp": False}, "target_modules"),
        ({"base_model": "other"}, "base_model_name_or_path is 'tiny'; allowed: 'other'"),
    ],
)
def test_a_checkpoint_of_another_form_is_refused(
    trainer: Trainer, state: RunState, changes: dict[str, Any], field: str
) -> None:
    other = spec(**{"train_unembed": True, **changes})
    with pytest.raises(InvalidField, match=f"{field}.*create_training_client_from_state"):
        read(export(state, with_optimizer=True), other, trainer.layout(other), with_optimizer=True)


def test_a_checkpoint_of_numbers_that_are_not_finite_is_refused(trainer: Trainer, state: RunState) -> None:
    weights = state.weights_P.clone()
    weights[17] = float("nan")
    files = export(trainer.begin(state.spec, weights), with_optimizer=True)
    with pytest.raises(UserError, match="weights have NaN"):
        read(files, state.spec, state.layout, with_optimizer=False)


@pytest.mark.parametrize("name", [CONFIG, ADAPTER])
def test_a_missing_file_is_corrupt(state: RunState, name: str) -> None:
    files = dict(export(state, with_optimizer=True))
    del files[name]
    with pytest.raises(Corrupt, match=f"{name} is missing"):
        read(files, state.spec, state.layout, with_optimizer=True)


@pytest.mark.parametrize("name", [CONFIG, ADAPTER, OPTIMIZER])
@pytest.mark.parametrize("keep", [0, 9, 200])
def test_a_cut_file_is_corrupt(state: RunState, name: str, keep: int) -> None:
    files = dict(export(state, with_optimizer=True))
    files[name] = bytes(files[name])[:keep]
    with pytest.raises(Corrupt):
        read(files, state.spec, state.layout, with_optimizer=True)


@pytest.mark.parametrize("pending", [True, False])
def test_freeze_and_thaw_give_the_same_bits(trainer: Trainer, state: RunState, pending: bool) -> None:
    if not pending:
        state, _ = done(trainer.optim_step(state, AdamW()))
    files = {name: bytes(data) for name, data in freeze(state).items()}
    weights, moments, grads = thaw(files, state.layout)
    again = RunState(state.spec, state.layout, weights, moments, grads)
    assert {name: bytes(data) for name, data in freeze(again).items()} == files
    assert torch.equal(weights, state.weights_P)
    assert moments.step == state.moments.step
    assert (grads is not None) is pending
    assert grads is None or (state.grads_P is not None and torch.equal(grads, state.grads_P))


def test_frozen_parts_share_memory_and_thawed_tensors_own_theirs(state: RunState) -> None:
    files = freeze(state)
    shared = np.frombuffer(files["weights.f32"], np.float32)
    assert shared.__array_interface__["data"][0] == state.weights_P.data_ptr()
    weights, _, _ = thaw(files, state.layout)
    assert weights.data_ptr() != state.weights_P.data_ptr()


@pytest.mark.parametrize("name", ["header.json", "weights.f32", "m.f32", "v.f32", "grads.f32"])
def test_a_broken_snapshot_is_corrupt(state: RunState, name: str) -> None:
    files = dict(freeze(state))
    files[name] = bytes(files[name])[:-4]
    with pytest.raises(Corrupt):
        thaw(files, state.layout)
    del files[name]
    with pytest.raises(Corrupt, match=f"{name} is missing"):
        thaw(files, state.layout)


def test_a_snapshot_of_another_layout_is_corrupt(trainer: Trainer, state: RunState) -> None:
    with pytest.raises(Corrupt, match="parameters"):
        thaw(freeze(state), trainer.layout(spec(rank=5)))
