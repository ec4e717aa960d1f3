"""Rotary position embeddings. N rows, H heads, D head elements."""

import math

import torch
from torch import Tensor

from knapper.engine.models.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """float32 (D/2): radians a position for each pair of a head's elements.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2. Rounded in float32 where the models' own code rounds, so that far
    positions turn by the same angle.
    """
    pair = torch.arange(0, config.head_dim, 2).float()
    plain = 1.0 / (config.rope_theta ** (pair / config.head_dim))
    return (plain if config.rope_scaling is None else _llama3_scaled(plain, config.rope_scaling)).to(device)


def _llama3_scaled(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Divides the frequencies of long waves by `factor`, keeps those of short ones, and interpolates between.

    Source: NTK-by-parts, arXiv 2309.00071, section 3.2, as Llama 3.1's reference code computes it (`apply_scaling` of
    llama-models; transformers' `_compute_llama3_parameters`).
    """
    rotations = scaling.original_context * plain / (2 * math.pi)
    smooth = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def cos_sin(positions_N: Tensor, frequencies_D: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, 1, D/2) of the rows' angles."""
    angles = positions_N[:, None].float() * frequencies_D
    return angles.cos()[:, None], angles.sin()[:, None]


def rotated(x_NHD: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates element pairs (d, d + D/2) by their position's angle, in float32.

    Source: RoFormer, arXiv 2104.09864, equation 34, with the pairs of transformers' `rotate_half`.
    """
    cos, sin = cos_sin
    first, second = x_NHD.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
