"""Rotary position embeddings. N rows, H heads, D head elements, W of them rotated."""

import math

import torch
from torch import Tensor

from knapper.engine.models.rotary import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling

CosSin = tuple[Tensor, Tensor]  # (N, 1, W/2) each


def frequencies(rope: Rope, device: torch.device) -> Tensor:
    """float32 (W/2): radians a position for each pair of a head's elements.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2. Rounded in float32 where the models' own code rounds, so that far
    positions turn by the same angle.
    """
    pair = torch.arange(0, rope.width, 2).float()
    wave = rope.theta ** (pair / rope.width)
    match rope.scaling:
        case LongScaling(factors):
            scaled = _long_scaled(wave, factors)
        case YarnScaling() as scaling:
            scaled = _yarn_scaled(wave, rope.theta, scaling)
        case Llama3Scaling() as scaling:
            scaled = _llama3_scaled(1.0 / wave, scaling)
        case LinearScaling(factor):
            scaled = 1.0 / wave / factor
        case _:
            scaled = 1.0 / wave
    return scaled.to(device)


def _long_scaled(wave: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Divides each frequency by a factor of its own.

    Source: LongRoPE, arXiv 2402.13753, equation 3.
    """
    return 1.0 / (torch.tensor(factors) * wave)


def _llama3_scaled(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divides the frequencies of long waves by `factor`, keeps those of short ones, and interpolates between.

    Source: NTK-by-parts, arXiv 2309.00071, section 3.2, as Llama 3.1's reference code computes it (`apply_scaling` of
    llama-models; transformers' `_compute_llama3_parameters`).
    """
    rotations = scaling.original_context * plain / (2 * math.pi)
    smooth = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _yarn_scaled(wave: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """Divides the frequencies of long waves by `factor`, keeps those of short ones, and interpolates between.

    Source: YaRN, arXiv 2309.00071, sections 3.2 and 3.4, with the ramp over pairs, and not over rotations, of its
    reference code (transformers' `_compute_yarn_parameters`).
    """
    pairs = len(wave)

    def pair_of(rotations: float) -> float:
        """The pair that rotates so often in the original context."""
        return pairs * math.log(scaling.original_context / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high += 0.001 if low == high else 0  # else the ramp would divide by zero
    kept = 1 - ((torch.arange(pairs).float() - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * wave) * (1 - kept) + 1.0 / wave * kept


def pair_axes(sections: tuple[int, int, int], device: torch.device) -> Tensor:
    """int64 (W/2): the axis of positions by which each pair turns: 0 time, 1 height, 2 width.

    The axes take turns, so that each has high and low frequencies; a section says how many pairs its axis has. Source:
    transformers' `Qwen3VLTextRotaryEmbedding.recomposition_frequencies`.
    """
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes.to(device)


def cos_sin(positions_N: Tensor, frequencies_W: Tensor, rope: Rope, axes_W: Tensor | None = None) -> CosSin:
    """Cosines and sines of the rows' angles, times the amplitude. Of positions (N, 3) each pair takes its axis'."""
    positions_NW = positions_N[:, None] if positions_N.dim() == 1 else positions_N[:, axes_W]
    angles = positions_NW.float() * frequencies_W
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return (cos, sin) if rope.amplitude == 1.0 else (cos * rope.amplitude, sin * rope.amplitude)


def rotated(x_NHD: Tensor, cos_sin: CosSin, rope: Rope) -> Tensor:
    """float32: the first W elements' pairs rotated by their position's angle.

    Source: RoFormer, arXiv 2104.09864, equation 34; its pairs are interleaved, those of transformers' `rotate_half` are
    W/2 apart.
    """
    cos, sin = cos_sin
    x_NHD = x_NHD.float()
    partial = rope.width < x_NHD.shape[-1]
    turning = x_NHD[..., : rope.width] if partial else x_NHD
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if rope.interleaved else turning.chunk(2, dim=-1)
    pairs = [first * cos - second * sin, second * cos + first * sin]
    rest = [x_NHD[..., rope.width :]] if partial else []
    return torch.cat([torch.stack(pairs, dim=-1).flatten(-2), *rest] if rope.interleaved else [*pairs, *rest], dim=-1)
