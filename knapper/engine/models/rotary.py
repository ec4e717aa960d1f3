"""Rotary positions as config.json states them; their formulas are in `layers.rope`. Loads no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from knapper.engine.models.fields import Raw, UnsupportedModel, number, optional, size

LayerType = Literal["full_attention", "sliding_attention"]
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling of rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: frequencies between `beta_slow` and `beta_fast` rotations within the original context are interpolated.

    `truncate`: the bounds between are whole pairs.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE: a factor for each frequency, those for texts within the original context."""

    factors: tuple[float, ...]


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True)
class Rope:
    """Rotations of the first `width` elements of each head. `interleaved`: pairs are (2d, 2d + 1), else (d, d + width /
    2). `amplitude` multiplies cosines and sines.
    """

    theta: float
    width: int
    scaling: Scaling | None = None
    interleaved: bool = False
    amplitude: float = 1.0


@dataclass(frozen=True)
class RopeRule:
    """What an architecture says of its rotary positions.

    `theta`: where config.json is silent. `scalings`: the types that it may name. `partial`: the part of a head that
    rotates where it is silent; None: all, and another part is refused. `local_theta`: of layers with a window, whose
    positions have a rule of their own; None: they have that of all others.
    """

    theta: float = 10000.0
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn")
    partial: float | None = None
    interleaved: bool = False
    local_theta: float | None = None

    def read(self, raw: Raw, path: Path, head_dim: int) -> Mapping[LayerType, Rope]:
        """The rotations of each type of layer. Raises UnsupportedModel for those that are not computed."""
        old, new = (_object(raw, field, path) for field in ("rope_scaling", "rope_parameters"))
        by_type = {name: _object(new, name, path) for name in (FULL, SLIDING) if name in new}
        if bool(by_type) != (self.local_theta is not None and bool(new)):
            known = f"expected by type of layer: {FULL}, {SLIDING}" if self.local_theta else "expected for all layers"
            raise UnsupportedModel(f"{path}: rope_parameters are {new!r}; {known}")
        full = self._rope({**raw, **(by_type.get(FULL) or new or old)}, path, head_dim)
        if self.local_theta is None:
            return {FULL: full, SLIDING: full}
        theta = number(raw, "rope_local_base_freq", path, self.local_theta)
        local = {**raw, "rope_theta": theta, **by_type.get(SLIDING, {})}
        return {FULL: full, SLIDING: self._rope(local, path, head_dim)}

    def _rope(self, raw: Raw, path: Path, head_dim: int) -> Rope:
        theta = number(raw, "rope_theta", path, self.theta)
        part = number(raw, "partial_rotary_factor", path, self.partial or 1.0)
        width = int(head_dim * part)
        if part > 1 or width < 2 or width % 2 or (self.partial is None and part != 1):
            allowed = "1" if self.partial is None else "up to 1, for whole pairs of a head"
            raise UnsupportedModel(f"{path}: partial_rotary_factor is {part}; supported: {allowed}")
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ("default", *self.scalings):
            allowed = ", ".join(("default", *self.scalings))
            raise UnsupportedModel(f"{path}: rope scaling {kind!r} is not supported; supported: {allowed}")
        scaling, amplitude = _scaling(str(kind), raw, path, width)
        return Rope(theta, width, scaling, self.interleaved, amplitude)


def served_context(context: int, raw: Raw, ropes: Mapping[LayerType, Rope], path: Path) -> int:
    """Tokens that a text may have: LongRoPE turns all positions otherwise once a text is longer than the original
    context, so that a row would depend on later tokens.
    """
    if any(isinstance(rope.scaling, LongScaling) for rope in ropes.values()):
        return min(context, _original_context(raw, path))
    return context


def _object(raw: Raw, field: str, path: Path) -> dict[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: {field} is {value!r}; expected an object")
    return value


def _original_context(raw: Raw, path: Path) -> int:
    """Of LongRoPE: Phi-3 has it beside its rope parameters, and there it counts first."""
    within = {**_object(raw, "rope_scaling", path), **_object(raw, "rope_parameters", path)}
    return size({**within, **raw}, "original_max_position_embeddings", path)


def _scaling(kind: str, raw: Raw, path: Path, width: int) -> tuple[Scaling | None, float]:
    """The scaling, and the amplitude that comes with it."""
    match kind:
        case "linear":
            return LinearScaling(number(raw, "factor", path)), 1.0
        case "llama3":
            return _llama3(raw, path), 1.0
        case "yarn":
            return _yarn(raw, path)
        case "longrope" | "su":
            return _long(raw, path, width)
    return None, 1.0


def _llama3(raw: Raw, path: Path) -> Llama3Scaling:
    return Llama3Scaling(
        factor=number(raw, "factor", path),
        low_freq_factor=number(raw, "low_freq_factor", path),
        high_freq_factor=number(raw, "high_freq_factor", path),
        original_context=size(raw, "original_max_position_embeddings", path),
    )


def _yarn(raw: Raw, path: Path) -> tuple[YarnScaling, float]:
    """Its amplitude is that of arXiv 2309.00071, equation 22, unless config.json states another."""
    original = size(raw, "original_max_position_embeddings", path, size(raw, "max_position_embeddings", path))
    factor = number(raw, "factor", path)
    scaling = YarnScaling(
        factor=factor,
        beta_fast=number(raw, "beta_fast", path, 32.0),
        beta_slow=number(raw, "beta_slow", path, 1.0),
        original_context=original,
        truncate=bool(raw.get("truncate", True)),
    )
    amplitude = _grown(factor)
    if raw.get("mscale") and raw.get("mscale_all_dim"):
        amplitude = _grown(factor, number(raw, "mscale", path)) / _grown(factor, number(raw, "mscale_all_dim", path))
    return scaling, number(raw, "attention_factor", path, amplitude)


def _grown(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_factor(raw: Raw, path: Path) -> float:
    """What YaRN multiplies scores by in DeepSeek's models, by `mscale_all_dim`: arXiv 2405.04434's reference code."""
    stated = {**_object(raw, "rope_scaling", path), **_object(raw, "rope_parameters", path)}
    if stated.get("rope_type", stated.get("type", "default")) != "yarn" or not stated.get("mscale_all_dim"):
        return 1.0
    return _grown(number(stated, "factor", path), number(stated, "mscale_all_dim", path)) ** 2


def _long(raw: Raw, path: Path, width: int) -> tuple[LongScaling, float]:
    """Its amplitude is that of arXiv 2402.13753, section 4, unless config.json states another."""
    factors = raw.get("short_factor")
    if not isinstance(factors, list) or len(factors) != width // 2:
        raise UnsupportedModel(f"{path}: short_factor is {factors!r}; expected a list of {width // 2} numbers")
    original = _original_context(raw, path)
    factor = number(raw, "factor", path, size(raw, "max_position_embeddings", path) / original)
    plain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    each = tuple(number({"short_factor": one}, "short_factor", path) for one in factors)
    return LongScaling(each), optional(raw, "attention_factor", path, None) or plain
