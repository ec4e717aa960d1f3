"""Layers that are computed again in the backward pass: the same bits, and less kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knapper.engine.layers import checkpointing
from knapper.engine.layers.checkpointing import PassBytes
from knapper.engine.models.blocks import RmsNorm
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.weights import Weights
from knapper.engine.training.trainer import RunState, Trainer
from tests.engine.runs import datum, done, request, spec, tiny_trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_5"])
def test_gradients_have_the_same_bits_however_many_layers_are_computed_again(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    trainer = tiny_trainer(tmp_path / "model", kind, dtype)
    rows = 3 * 40
    saved = {layers: _step(trainer, layers, rows) for layers in (2, 1, 0)}
    for layers in (1, 0):
        assert torch.equal(saved[layers][0], saved[2][0])
        assert np.array_equal(saved[layers][1], saved[2][1])


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gemma2",
        "gemma3",
        "glm4",
        "gpt_oss",
        "deepseek_v3",
        "glm4_moe_lite",
        "olmo3",
        "phi4",
        "granite",
        "mistral",
        "mixtral",
        "lfm2",
        "lfm2_bias",
        "qwen3_5",
    ],
)
def test_what_a_row_leaves_in_a_layer_is_what_is_reckoned_with(tmp_path: Path, kind: str) -> None:
    trainer = tiny_trainer(tmp_path / "model", kind)
    rows = 3 * 40
    whole, least = _saved(trainer, 2, rows), _saved(trainer, 0, rows)
    assert isinstance(trainer.decoder, Decoder)
    reckoned = rows * checkpointing.saved_bytes_of_row(trainer.decoder.config)
    # The first layer keeps everything either way; the second instead keeps its input, which the first made anyway.
    # Adapters add to it, the narrower the model, the more; so do copies of halves that are no whole registers wide.
    assert 0.85 * reckoned < whole - least < 1.3 * reckoned


def test_small_passes_keep_everything_and_large_ones_what_there_is_room_for() -> None:
    mib = 1 << 20
    assert checkpointing.on_cpu(-300 * mib, 512 * mib, 1).total == 1024 * mib
    assert checkpointing.on_cpu(100 * mib, 9000 * mib, 1).total == 9000 * mib
    assert checkpointing.on_cpu(3000 * mib, 512 * mib, 1).total == 3000 * mib


def _request(rows: int) -> list[object]:
    rng = np.random.default_rng(3)
    return [datum(rows // 3, "cross_entropy", rng) for _ in range(3)]


def _limited(trainer: Trainer, layers: int, rows: int) -> None:
    decoder = trainer.decoder
    assert isinstance(decoder, Decoder)
    decoder.passes = PassBytes(layers * rows * decoder.passes.layer_row, 0, decoder.passes.layer_row)


def _step(trainer: Trainer, layers: int, rows: int) -> tuple[Tensor, np.ndarray]:
    """(gradients, log-probabilities), of a run whose B is not zero any more."""
    state = trainer.create(spec())
    _limited(trainer, layers, rows)
    weights_P = torch.randn(state.weights_P.shape, generator=torch.Generator().manual_seed(2)) * 0.05
    state = trainer.begin(spec(), weights_P)
    after: RunState
    after, output = done(trainer.forward_backward(state, request(_request(rows))))  # type: ignore[arg-type]
    assert after.grads_P is not None
    return after.grads_P, np.concatenate([one["logprobs"] for one in output.outputs])


def _saved(trainer: Trainer, layers: int, rows: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, the model's own aside."""
    assert isinstance(trainer.decoder, Decoder)
    weights = trainer.decoder.weights
    own = {one.untyped_storage().data_ptr() for one in (weights.embed, *_norms(weights))}
    saved: dict[int, int] = {}
    inside = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not inside:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor: Tensor) -> Tensor:
        nonlocal inside
        inside = 1  # from here on it is the backward pass, whose own keeping is not meant
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        _step(trainer, layers, rows)
    return sum(saved.values())


def _norms(weights: Weights) -> list[Tensor]:
    within = [one for layer in weights.layers for block in (layer, layer.mixer) for one in vars(block).values()]
    return [one.weight for one in (weights.norm, *within) if isinstance(one, RmsNorm)]
