"""Adapters of experts as PEFT holds them beside transformers 5, where a layer's experts are two tensors.

PEFT reads a pair for each expert's gate, up and down; it makes one pair of gate and up, of twice the rank, whose B has
zeros where the two would mix. Of gpt-oss they are one parameter in files, too. E experts.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from knapper.engine import checkpoint_format
from knapper.engine.models.config import LoraTarget

_DOWN = ("down_proj", "w2")
_SECOND = ("up_proj", "w3")


def matrices(named: Mapping[str, Tensor], target: LoraTarget) -> tuple[Tensor, Tensor]:
    """A (E, R, inputs) and B (E, outputs, R) of a target module, of what PEFT has by name; views."""
    assert target.experts is not None
    if target.whole:
        (name_a,), (name_b,) = checkpoint_format.peft_sides(target)
        b_OR = named[name_b].view(target.outputs, -1, target.experts)
        return named[name_a].view(target.experts, -1, target.inputs), b_OR.permute(2, 0, 1)
    block, _, expert = target.module.partition(".experts.{}.")
    prefix = f"base_model.model.{block.replace('block_sparse_moe', 'mlp')}.experts"
    down = expert in _DOWN
    a, b = (named[f"{prefix}.{'' if down else 'base_layer.'}lora_{side}.weight"] for side in "AB")
    a, b = a.view(target.experts, -1, target.inputs), b.view(len(b), -1, target.experts).permute(2, 0, 1)
    if down or len(b) == target.outputs:  # or there is no gate beside it
        return a, b
    half = int(expert in _SECOND)
    rank, outputs = a.shape[1] // 2, target.outputs
    own = slice(half * rank, (half + 1) * rank)
    return a[:, own], b[:, half * outputs : (half + 1) * outputs, own]


def fill(model: torch.nn.Module, found: Iterable[tuple[LoraTarget, Tensor, Tensor]]) -> None:
    """Put A and B of experts where PEFT, of a composite's, reads none."""
    named = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters()}
    for target, *sides in found:
        if target.experts is not None:
            for own, matrix in zip(matrices(named, target), sides, strict=True):
                own.copy_(matrix)


def keep_zeros(model: torch.nn.Module, targets: Sequence[LoraTarget]) -> None:
    """No gradient where gate and up would mix: a pair of each is what is trained."""
    parameters = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".experts." in name}
    own = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for target in targets:
        if target.experts is not None:
            for matrix in matrices(own, target):
                matrix.fill_(1.0)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            parameter.register_hook(own[name].mul)
