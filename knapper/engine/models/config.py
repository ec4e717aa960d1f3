"""The configuration of a model directory, checked here so that no later code guesses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from knapper.engine.models.registry import ARCHITECTURES
from knapper.errors import NotFound, UserError

ComputedBy = Literal["native", "transformers"]
Part = Literal["attention", "mlp", "unembed"]
HEAD: Final = "lm_head"


class UnsupportedModel(UserError):
    """The decoder does not compute the architecture, or an option of it."""

    code = "unsupported_model"


@dataclass(frozen=True)
class LoraTarget:
    """A linear, (inputs) -> (outputs), that an adapter may have. `name` is ours; `module` is its name in transformers,
    `peft_target` its name in PEFT's target_modules.
    """

    name: str
    inputs: int
    outputs: int
    part: Part
    module: str
    peft_target: str


class Facts(Protocol):
    """Limits of a model for requests and adapters. `context` in tokens; `eos`: token ids that end a text; `tied`: the
    head is the embedding; `lora_targets`: from the first layer to the last, then the head.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def eos(self) -> tuple[int, ...]: ...

    @property
    def tied(self) -> bool: ...

    @property
    def lora_targets(self) -> tuple[LoraTarget, ...]: ...


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (`rope_type: llama3`); its formula and source are in `layers.rope`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. Sizes in elements; `context` in tokens; `eos` token ids that end a text."""

    model_type: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool  # the head is the embedding
    qk_norm: bool  # RMS norm of each query and key head before rotation
    attention_bias: bool  # biases on q, k and v
    output_bias: bool  # a bias on o
    context: int
    eos: tuple[int, ...]
    without_positions: frozenset[int] = frozenset()  # layers that do not rotate queries and keys

    @cached_property
    def lora_targets(self) -> tuple[LoraTarget, ...]:
        """In each layer q, k, v, o, gate, up, down."""
        hidden, inner = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (("q_proj", hidden, q), ("k_proj", hidden, kv), ("v_proj", hidden, kv), ("o_proj", q, hidden))
        mlp = (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden))

        def layer(index: int) -> list[LoraTarget]:
            prefix = f"model.layers.{index}"
            return [
                *(
                    LoraTarget(f"layers.{index}.{name}", x, y, "attention", f"{prefix}.self_attn.{name}", name)
                    for name, x, y in attention
                ),
                *(
                    LoraTarget(f"layers.{index}.{name}", x, y, "mlp", f"{prefix}.mlp.{name}", name)
                    for name, x, y in mlp
                ),
            ]

        head = LoraTarget(HEAD, hidden, self.vocab_size, "unembed", HEAD, HEAD)
        return (*(target for index in range(self.layers) for target in layer(index)), head)

    @classmethod
    def read(cls, directory: Path) -> "ModelConfig":
        """The configuration in `config.json`, with the end tokens of `generation_config.json`.

        Raises NotFound without a config.json, UnsupportedModel for an architecture or option that is not supported.
        """
        raw = read_json(directory / "config.json")
        if raw is None:
            raise NotFound(
                f"{directory} has no config.json; a model directory holds config.json and safetensors weights"
            )
        architecture = ARCHITECTURES.get(str(raw.get("model_type")))
        if architecture is None:
            names = ", ".join(map(str, _listed(raw.get("architectures")))) or "?"
            raise UnsupportedModel(
                f"{directory}: model_type is {raw.get('model_type')!r} (architecture {names}); "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        if reason := architecture.refusal(raw):
            raise UnsupportedModel(f"{directory}: {architecture.model_type} with {reason} is not supported")
        hidden, heads = _size(raw, "hidden_size", directory), _size(raw, "num_attention_heads", directory)
        kv_heads = _size(raw, "num_key_value_heads", directory, heads)
        if heads % kv_heads:
            raise UnsupportedModel(f"{directory}: {heads} heads do not divide over {kv_heads} key/value heads")
        theta, scaling = _rope(raw, directory, architecture.rope_theta)
        return cls(
            model_type=architecture.model_type,
            vocab_size=_size(raw, "vocab_size", directory),
            hidden=hidden,
            layers=_size(raw, "num_hidden_layers", directory),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_size(raw, "head_dim", directory, hidden // heads),
            intermediate=_size(raw, "intermediate_size", directory),
            rms_eps=_number(raw, "rms_norm_eps", directory, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(raw.get("tie_word_embeddings", architecture.tied)),
            qk_norm=architecture.qk_norm,
            attention_bias=architecture.qkv_bias(raw),
            output_bias=architecture.output_bias(raw),
            context=_size(raw, "max_position_embeddings", directory),
            eos=end_tokens(raw, directory),
            without_positions=architecture.without_positions(raw),
        )


def computed_by(directory: Path) -> ComputedBy:
    """Who computes the layers of the model in `directory`. Raises NotFound, or UserError for a broken config.json."""
    try:
        ModelConfig.read(directory)
    except UnsupportedModel:
        return "transformers"
    return "native"


def end_tokens(raw: Mapping[str, Any], directory: Path) -> tuple[int, ...]:
    """The end tokens of `raw`, the text model's configuration, and of generation_config.json."""
    more = directory / "generation_config.json"
    generation = read_json(more) or {}
    ids = _ids(raw.get("eos_token_id"), directory / "config.json") | _ids(generation.get("eos_token_id"), more)
    return tuple(sorted(ids))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None without it. Raises UserError for an unreadable file or another value."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give this user the right to read it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. Download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def expect_text_model(raw: Mapping[str, Any], directory: Path) -> None:
    """Raises UnsupportedModel unless it is a decoder-only text model with weights in floating point."""
    for refused, reason in (
        (raw.get("is_encoder_decoder"), "it is an encoder-decoder; served: decoder-only language models"),
        (raw.get("quantization_config") is not None, "its weights are quantized; use the unquantized model"),
        ("vision_config" in raw or "audio_config" in raw, "it takes more than text; use its text-only model"),
    ):
        if refused:
            raise UnsupportedModel(f"{described(raw, directory)} is not served: {reason}")


def described(raw: Mapping[str, Any], directory: Path) -> str:
    """The model, as an error message names it."""
    class_name = next(iter(_listed(raw.get("architectures"))), None)
    return f"{directory}: model_type {raw.get('model_type')!r}, architecture {class_name!r}"


def _size(raw: Mapping[str, Any], field: str, directory: Path, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{directory}/config.json: {field} is {value!r}; expected a whole number of 1 or more")
    return value


def _number(raw: Mapping[str, Any], field: str, directory: Path, default: float | None = None) -> float:
    value = raw.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UnsupportedModel(f"{directory}/config.json: {field} is {value!r}; expected a number above 0")
    return float(value)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids(value: object, path: Path) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise UserError(f"{path}: eos_token_id is {value!r}; expected a token id, or a list of them")
    return set(ids)


def _rope(raw: Mapping[str, Any], directory: Path, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise UnsupportedModel(f"{directory}/config.json: rope_scaling and rope_parameters are no objects")
    rope = {"rope_theta": raw.get("rope_theta", default_theta), **(new or old)}
    theta = _number(rope, "rope_theta", directory)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModel(f"{directory}: rope scaling {kind!r} is not supported; supported: default, llama3")
    return theta, RopeScaling(
        factor=_number(rope, "factor", directory),
        low_freq_factor=_number(rope, "low_freq_factor", directory),
        high_freq_factor=_number(rope, "high_freq_factor", directory),
        original_context=_size(rope, "original_max_position_embeddings", directory),
    )
