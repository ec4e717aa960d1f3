"""A LoRA adapter (arXiv 2106.09685): its target modules, its layout in memory, its initial weights.

R rank, P parameters of an adapter.

All numbers of one run lie in one flat float32 arena, so that an optimizer step, a save and a snapshot are each one
operation, not hundreds. Moments and gradients are arenas of the same layout. The order: layers from the first to the
last; in each q, k, v, o, gate, up, down; lm_head at the end; of every target module A (R, in), then B (out, R),
row-major; of a mixture's A of all experts, then B of all.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from knapper import limits
from knapper.engine.models.config import Facts, LoraTarget
from knapper.errors import InvalidField
from knapper.state.journal.records import Spec


@dataclass(frozen=True)
class Lora:
    """An adapter for a forward pass, by target module: y += scale * (x @ a.T) @ b.T.

    `a`: (R, in), `b`: (out, R), float32; of experts (E, R, in) and (E, out, R). The names are those of
    `Facts.lora_targets`; a missing one is not adapted. `rounded`: `Layout.rounded`, for a GPU's products in training.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float
    rounded: "Lora | None" = None

    @property
    def for_products(self) -> "Lora":
        return self.rounded or self

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrices in (self.a, self.b) for matrix in matrices.values())


@dataclass(frozen=True)
class Layout:
    """The location of each target module's A and B in an arena (P). `merges`: the adapter can be added into the model's
    weights, because none of them has a second use.
    """

    rank: int
    lora_targets: tuple[LoraTarget, ...]
    merges: bool = True

    @cached_property
    def numel(self) -> int:
        return sum(target.numel(self.rank) for target in self.lora_targets)

    def matrices(self, arena_P: Tensor) -> Iterator[tuple[LoraTarget, Tensor, Tensor]]:
        """(target module, A, B) in order; A and B are views of the arena."""
        start = 0
        for target in self.lora_targets:
            a_shape, b_shape = target.shapes(self.rank)
            middle, end = start + math.prod(a_shape), start + target.numel(self.rank)
            yield target, arena_P[start:middle].view(a_shape), arena_P[middle:end].view(b_shape)
            start = end

    def lora(self, arena_P: Tensor, scale: float) -> Lora:
        """The adapter in the arena; its tensors are views."""
        matrices = list(self.matrices(arena_P))
        return Lora({target.name: a for target, a, _ in matrices}, {target.name: b for target, _, b in matrices}, scale)

    def rounded(self, arena_P: Tensor, scale: float, dtype: torch.dtype) -> Lora:
        """A copy in `dtype`, for products; of all but experts, whose pairs are rounded layer by layer: of a mixture
        they are nearly the whole adapter.
        """
        dense: list[LoraTarget] = []
        pieces: list[Tensor] = []
        start = 0
        for of_experts, targets in itertools.groupby(self.lora_targets, lambda target: target.experts is not None):
            group = list(targets)
            end = start + sum(target.numel(self.rank) for target in group)
            if not of_experts:
                dense += group
                pieces.append(arena_P[start:end])
            start = end
        joined = pieces[0] if len(pieces) == 1 else torch.cat([arena_P[:0], *pieces])  # of experts alone there are none
        return replace(self, lora_targets=tuple(dense)).lora(joined.to(dtype), scale)

    def initial(self, seed: int) -> Tensor:
        """The initial weights, as PEFT's: A uniform in +-1/sqrt(inputs) (kaiming uniform, a = sqrt(5)), B zero.

        Drawn on the CPU by a generator of its own, A by A in the arena's order: a function of the layout and the seed
        alone.
        """
        generator = torch.Generator().manual_seed(seed)
        arena_P = torch.zeros(self.numel)
        for target, a, _ in self.matrices(arena_P):
            bound = 1 / math.sqrt(target.inputs)
            a.uniform_(-bound, bound, generator=generator)
        return arena_P


def layout(config: Facts, spec: Spec) -> Layout:
    """The layout of a run on a model. Raises InvalidField for a spec that cannot be trained.

    A trained unembedding is LoRA on lm_head. Where the head shares its matrix with the embedding, the embedding stays
    frozen (docs/decisions/0002-tied-lm-head.md), and with `keep_tied` the head too (0023).
    """
    if not 1 <= spec.rank <= limits.rank_max:
        raise InvalidField("lora_config.rank", spec.rank, f"1 to {limits.rank_max}")
    if not limits.seed_min <= spec.seed <= limits.seed_max:
        raise InvalidField("lora_config.seed", spec.seed, f"{limits.seed_min} to {limits.seed_max}")
    if not (math.isfinite(spec.alpha) and spec.alpha > 0):
        raise InvalidField("alpha", spec.alpha, "a finite number above 0")
    if not (spec.train_attn or spec.train_mlp or spec.train_unembed):
        raise InvalidField(
            "lora_config", "train_attn=False, train_mlp=False, train_unembed=False", "at least one of them True"
        )
    head = spec.train_unembed and not (config.tied and spec.keep_tied)
    trained = {"attention": spec.train_attn, "mlp": spec.train_mlp, "unembed": head}
    lora_targets = tuple(target for target in config.lora_targets if trained[target.part])
    return Layout(spec.rank, lora_targets, merges=not (head and config.tied))
