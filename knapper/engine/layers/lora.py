"""A LoRA adapter: which linears it touches, where its numbers lie, and how it begins.

R rank, P parameters of an adapter.

All numbers of one run lie in one flat float32 arena, so that an optimizer step, a save and a snapshot are each one
operation, not hundreds. Moments and gradients are arenas of the same layout. The order: layers from the first to the
last; in each q, k, v, o, gate, up, down; lm_head at the end; of every site A (R, in), then B (out, R), row-major.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from knapper import limits
from knapper.engine.models.config import Facts, Site
from knapper.errors import InvalidField
from knapper.state.journal.records import Spec


@dataclass(frozen=True)
class Lora:
    """What a forward pass reads, by site: y += scale * (x @ a.T) @ b.T.

    `a`: (R, in), `b`: (out, R), float32. Sites are named as the model names them (`Facts.sites`); one that is missing
    is not adapted.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrices in (self.a, self.b) for matrix in matrices.values())


@dataclass(frozen=True)
class Layout:
    """Where each site's A and B lie in an arena (P). `merges`: the adapter can be added into the model's own weights,
    since none of them is used elsewhere too.
    """

    rank: int
    sites: tuple[Site, ...]
    merges: bool = True

    @cached_property
    def numel(self) -> int:
        return sum(self.rank * (site.inputs + site.outputs) for site in self.sites)

    def matrices(self, arena_P: Tensor) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """(site, A, B) in order; A and B are views of the arena."""
        start = 0
        for site in self.sites:
            middle = start + self.rank * site.inputs
            end = middle + site.outputs * self.rank
            yield site, arena_P[start:middle].view(self.rank, -1), arena_P[middle:end].view(-1, self.rank)
            start = end

    def lora(self, arena_P: Tensor, scale: float) -> Lora:
        """The adapter that lies in the arena; its tensors are views."""
        found = list(self.matrices(arena_P))
        return Lora({site.name: a for site, a, _ in found}, {site.name: b for site, _, b in found}, scale)

    def begin(self, seed: int) -> Tensor:
        """The weights of a new adapter, as PEFT begins: A uniform in +-1/sqrt(inputs) (kaiming uniform, a = sqrt(5)), B
        zero.

        Drawn on the CPU by a generator of its own, A by A in the arena's order: a function of the layout and the seed
        alone.
        """
        generator = torch.Generator().manual_seed(seed)
        arena_P = torch.zeros(self.numel)
        for site, a, _ in self.matrices(arena_P):
            bound = 1 / math.sqrt(site.inputs)
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
    wanted = {"attention": spec.train_attn, "mlp": spec.train_mlp, "unembed": head}
    sites = tuple(site for site in config.sites if wanted[site.part])
    return Layout(spec.rank, sites, merges=not (head and config.tied))
