"""The configuration of a model directory, checked here so that no later code guesses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from knapper import limits
from knapper.engine.models.architecture import PLAIN_NORM, Architecture, NormRule
from knapper.engine.models.composite import BODY, Composite, UnsupportedText
from knapper.engine.models.fields import Raw, UnsupportedModel, listed, number, read_json, size
from knapper.engine.models.gaps import MISSING
from knapper.engine.models.layer import Attention, Layer
from knapper.engine.models.linear_shape import Part, expert_names
from knapper.engine.models.mlp import Mixture, MixtureNames
from knapper.engine.models.packed import Packing, refusal
from knapper.engine.models.recurrent import Recurrent
from knapper.engine.models.registry import ARCHITECTURES, COMPOSITES
from knapper.errors import InvalidField, NotFound, UserError

ComputedBy = Literal["native", "transformers"]
HEAD: Final = "lm_head"


@dataclass(frozen=True)
class LoraTarget:
    """A linear, (inputs) -> (outputs), that an adapter may have. `name` is ours; `module` is its name in transformers,
    `peft_target` its name in PEFT's target_modules. `experts`: it is so many linears, each with a pair of its own, and
    `module` has {} for an expert's number. `peft_parameter`: its weight's name in PEFT's target_parameters, for one
    that is not in target_modules: of a mixture PEFT takes the short name of an MLP's linears for that of the experts',
    and of some types it does not know that their experts are joined. `whole`: `module` names all experts, as PEFT does.
    """

    name: str
    inputs: int
    outputs: int
    part: Part
    module: str
    peft_target: str
    experts: int | None = None
    peft_parameter: str = ""
    whole: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return expert_names(self.module, self.experts)

    def numel(self, rank: int) -> int:
        """Parameters of its adapter."""
        return sum(math.prod(shape) for shape in self.shapes(rank))

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        experts = () if self.experts is None else (self.experts,)
        return (*experts, rank, self.inputs), (*experts, self.outputs, rank)


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


def bounded_context(context: int, setting: int) -> int:
    """Tokens that are served of a model's own `context`; 0: all. Raises InvalidField for more than it has."""
    if setting > context:
        raise InvalidField("KNAPPER_CONTEXT", setting, f"up to {context}, the model's own context; 0 takes all of it")
    return setting or context


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. Sizes in elements; `context` in tokens; `eos` token ids that end a text.

    `embedding_scale` multiplies embeddings, `logits_scale` logits; `logits_cap`: l becomes cap tanh(l / cap).
    `body`: the decoder's place in transformers' model; `final_norm`: the last norm's, in a model of text alone.
    `extra_layers`: that the file may have behind these, to predict further tokens; they are left out. `unread`: so is
    what a layer's tensors begin with. `packing`: how the files have weights in few bits; None: they have none.
    `image_axes`: how many rotary pairs turn by the time, height and width of a row's position, if prompts may have
    images.
    """

    model_type: str
    vocab_size: int
    hidden: int
    layers: tuple[Layer, ...]
    rms_eps: float
    tied: bool  # the head is the embedding
    context: int
    eos: tuple[int, ...]
    norm: NormRule = PLAIN_NORM
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_cap: float | None = None
    body: str = "model"
    final_norm: str = "model.norm"
    extra_layers: int = 0
    unread: tuple[str, ...] = ()
    packing: Packing | None = None
    image_axes: tuple[int, int, int] | None = None

    @cached_property
    def lora_targets(self) -> tuple[LoraTarget, ...]:
        """The linears of each layer, then the head."""
        architecture = ARCHITECTURES.get(self.model_type)
        mixed = architecture is not None and architecture.mixture is not None  # by its type, as PEFT takes it
        within = (
            LoraTarget(
                f"layers.{index}.{shape.name}", shape.inputs, shape.outputs, shape.part,
                module := f"{self.body}.layers.{index}.{shape.joined if shape.together else shape.module}",
                # Linears of images may have the short name, too.
                module if self.body == BODY else shape.peft_target,
                shape.experts,
                peft_parameter=shape.joined
                or (f"{shape.module}.weight" if mixed and shape.part == "mlp" and not shape.experts else ""),
                whole=shape.whole or shape.together,
            )
            for index, layer in enumerate(self.layers)
            for shape in layer.linears(self.hidden)
        )  # fmt: skip
        return (*within, LoraTarget(HEAD, self.hidden, self.vocab_size, "unembed", HEAD, HEAD))

    @property
    def has_experts(self) -> bool:
        return any(target.experts is not None for target in self.lora_targets)

    @property
    def experts_of_row(self) -> int:
        """The most of a layer; 1 of a dense model."""
        return max(layer.mlp.routing.active if isinstance(layer.mlp, Mixture) else 1 for layer in self.layers)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(layers with attention, key/value heads, head elements) of what decoding keeps of a token."""
        (shape,) = {(mixer.kv_heads, mixer.head_dim) for mixer in self.attention}
        return len(self.attention), *shape

    @cached_property
    def attention(self) -> tuple[Attention, ...]:
        """Of the layers that have it; each keeps keys and values of the same shape."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @cached_property
    def recurrent(self) -> tuple[Recurrent, ...]:
        """Of the layers that have none: each keeps a state of its own."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Recurrent))

    @property
    def state_numbers(self) -> int:
        """float32 numbers that decoding keeps of a sequence, however long it is."""
        return sum(layer.state_numbers for layer in self.layers)

    @classmethod
    def read(cls, directory: Path) -> "ModelConfig":
        """The configuration in `config.json`, with the end tokens of `generation_config.json`.

        Raises NotFound without a config.json, UnsupportedModel for an architecture or option that is not supported,
        UnsupportedText if it is that of a composite's text part.
        """
        raw = read_json(directory / "config.json")
        if raw is None:
            raise NotFound(
                f"{directory} has no config.json; a model directory holds config.json and safetensors weights"
            )
        if (composite := composite_of(raw)) is None:
            return cls._of(raw, directory)
        try:
            text = cls._of(composite.text(raw, directory), directory, composite.experts)
            return replace(text, body=BODY, image_axes=composite.axes(raw, directory))
        except UnsupportedModel as error:
            raise UnsupportedText(f"text_config, of a model of type {composite.model_type}: {error}") from error

    @classmethod
    def _of(cls, raw: Raw, directory: Path, experts: MixtureNames | None = None) -> "ModelConfig":
        path = directory / "config.json"
        _expect_few_layers(raw, path)
        _expect_whole(raw, directory)
        architecture = architecture_of(raw.get("model_type"))
        if architecture is None:
            names = ", ".join(map(str, listed(raw.get("architectures")))) or "?"
            raise UnsupportedModel(
                f"{directory}: model_type is {raw.get('model_type')!r} (architecture {names}); "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        if experts is not None and architecture.mixture is not None:
            architecture = replace(architecture, mixture=replace(architecture.mixture, names=experts))
        if reason := architecture.refusal(raw):
            raise UnsupportedModel(f"{directory}: {architecture.model_type} with {reason} is not supported")
        return cls(
            model_type=architecture.model_type,
            vocab_size=size(raw, "vocab_size", path),
            hidden=size(raw, "hidden_size", path),
            layers=architecture.layers(raw, path),
            rms_eps=number(raw, architecture.names.eps_field, path, architecture.rms_eps),
            tied=architecture.ties(raw),
            context=architecture.context(raw, path),
            eos=end_tokens(raw, directory),
            norm=architecture.norm,
            final_norm=architecture.names.final_norm,
            embedding_scale=architecture.embedding(raw, path),
            logits_scale=1 / architecture.logits(raw, path),
            logits_cap=architecture.cap(raw, path),
            extra_layers=architecture.extra_layers(raw, path),
            unread=architecture.unread,
            packing=Packing.read(raw, path),
        )


def architecture_of(model_type: object) -> Architecture | None:
    """The row of a model_type, or of another name that files have for it."""
    named = {name: row for row in ARCHITECTURES.values() for name in row.also_named}
    return ARCHITECTURES.get(str(model_type)) or named.get(str(model_type))


def composite_of(raw: Raw) -> Composite | None:
    """The row of a checkpoint of which the text part alone is served; None for a model of text."""
    return COMPOSITES.get(str(raw.get("model_type")))


def is_composite(directory: Path) -> bool:
    return composite_of(read_json(directory / "config.json") or {}) is not None


def serves_images(directory: Path) -> bool:
    """Whether prompts may have images, as far as the configuration tells. Raises UserError for a broken one."""
    raw = read_json(directory / "config.json") or {}
    composite = composite_of(raw)
    return composite is not None and composite.axes(raw, directory) is not None


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


def expect_text_model(raw: Mapping[str, Any], directory: Path) -> None:
    """Raises UnsupportedModel unless it is a decoder-only text model with weights that can be read, UnsupportedText
    for one that is known to be computed in part only.
    """
    _expect_whole(raw, directory)
    native = architecture_of(raw.get("model_type")) is not None or composite_of(raw) is not None
    packed = raw.get("quantization_config") is not None and not native
    quantized = refusal(raw) or ("quantized weights, which are read of native types alone" if packed else "")
    for refused, reason in (
        (raw.get("is_encoder_decoder"), "it is an encoder-decoder; served: decoder-only language models"),
        (bool(quantized), f"it has {quantized}; use the unquantized model"),
        (
            composite_of(raw) is None and ("vision_config" in raw or "audio_config" in raw),
            "it takes more than text; use its text-only model",
        ),
    ):
        if refused:
            raise UnsupportedModel(f"{described(raw, directory)} is not served: {reason}")


def described(raw: Mapping[str, Any], directory: Path) -> str:
    """The model, as an error message names it."""
    class_name = next(iter(listed(raw.get("architectures"))), None)
    return f"{directory}: model_type {raw.get('model_type')!r}, architecture {class_name!r}"


def _expect_whole(raw: Raw, directory: Path) -> None:
    if (missing := MISSING.get(str(raw.get("model_type")))) is not None:
        raise UnsupportedText(f"{described(raw, directory)} is not served: it needs {missing}")


def _expect_few_layers(raw: Raw, path: Path) -> None:
    """No UnsupportedModel: transformers would make all of them, too."""
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > limits.model_layers_max:
        raise UserError(f"{path}: num_hidden_layers is {layers}; allowed: at most {limits.model_layers_max}")


def _ids(value: object, path: Path) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise UserError(f"{path}: eos_token_id is {value!r}; expected a token id, or a list of them")
    return set(ids)
