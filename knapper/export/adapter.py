"""A PEFT directory of LoRA, read as what it adds to each linear.

R rank, I inputs, O outputs. Whatever this cannot read exactly it refuses, with the reason.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor

from knapper import limits
from knapper.engine.models import weight_files
from knapper.engine.models.fields import read_json
from knapper.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_SIDE: Final = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(\.default)?\.weight")
_REPEATS: Final = re.compile(r"[*+{]")
_REPEATED_GROUP: Final = re.compile(r"\)[*+{]")

# Options of PEFT's LoraConfig that give the matrices another meaning, and the values that leave it.
_PLAIN: Final[Mapping[str, tuple[object, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base's weights too
}


@dataclass(frozen=True)
class Pair:
    """The two matrices of a linear, A (R, I) and B (O, R), by their names in the file: y += scale * (x @ A.T) @ B.T."""

    module: str
    a: str
    b: str
    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True)
class PeftAdapter:
    """`pairs`: by the module's name in transformers. `base_model`: as the adapter names it, perhaps empty."""

    directory: Path
    base_model: str
    pairs: Mapping[str, Pair]

    def matrices(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A and B in float32, A with the scale in it."""
        a_RI, b_OR = self.stored(pair)
        return a_RI * pair.scale, b_OR

    def stored(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A and B as they are, in float32."""
        file = weight_files.opened(self.directory / WEIGHTS, "pt")
        a_RI: Tensor = file.get_tensor(pair.a)  # type: ignore[no-untyped-call]  # the library has no types here
        b_OR: Tensor = file.get_tensor(pair.b)  # type: ignore[no-untyped-call]
        return a_RI.float(), b_OR.float()


def read(directory: Path) -> PeftAdapter:
    """The adapter in the directory. Raises UserError for one that is not there, damaged, or more than LoRA."""
    config = _config(directory)
    for option, plain in _PLAIN.items():
        if option in config and config[option] not in plain:
            raise UserError(
                f"{directory / CONFIG}: {option} is {json.dumps(config[option])[:120]}; allowed: "
                f"{' or '.join(map(json.dumps, plain))}. Only plain LoRA is read exactly"
            )
    sides = _sides(directory / WEIGHTS)
    pairs = {module: _pair(directory, module, found, config) for module, found in sorted(sides.items())}
    return PeftAdapter(directory, str(config.get("base_model_name_or_path") or ""), pairs)


def _config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG)
    if config is None:
        raise UserError(f"{directory} has no {CONFIG}; a PEFT directory holds it and {WEIGHTS}")
    return config


def _sides(path: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """By module, A and B: (name, shape). Raises UserError for a tensor that is neither."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; adapters in other formats are not read")
    file: safe_open = weight_files.opened(path, "numpy")
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for name in weight_files.names(file):
        match = _SIDE.fullmatch(name.removeprefix(_PREFIX))
        shape = list(file.get_slice(name).get_shape())  # type: ignore[no-untyped-call]  # the library has no types here
        if match is None or len(shape) != 2:
            raise UserError(
                f"{path}: tensor {name} {shape} is no LoRA matrix; allowed: MODULE.lora_A and .lora_B. "
                "Copies of the base's weights are left out by save_pretrained(..., save_embedding_layers=False)"
            )
        found.setdefault(match["module"], {})[match["side"]] = (name, shape)
    if not found:
        raise UserError(f"{path} has no tensors; save the adapter again")
    return found


def _pair(directory: Path, module: str, sides: Mapping[str, tuple[str, list[int]]], config: Mapping[str, Any]) -> Pair:
    if set(sides) != {"A", "B"}:
        raise UserError(f"{directory / WEIGHTS}: {module} has lora_{next(iter(sides))} alone; expected A and B")
    (a, (rank, inputs)), (b, (outputs, rank_of_b)) = sides["A"], sides["B"]
    promised = _promised(directory, "r", "rank_pattern", module, config)
    if not rank == rank_of_b == promised:
        raise UserError(
            f"{directory}: {module} has A of rank {rank} and B of rank {rank_of_b}; {CONFIG} makes it {promised:g}"
        )
    alpha = _promised(directory, "lora_alpha", "alpha_pattern", module, config)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Pair(module, a, b, rank, inputs, outputs, scale)


def _promised(directory: Path, field: str, patterns: str, module: str, config: Mapping[str, Any]) -> float:
    """The module's own rank or alpha: of the first pattern that its name ends in, as PEFT matches, or of all."""
    value, own_values = config.get(field), config.get(patterns) or {}
    if not isinstance(own_values, dict):
        raise UserError(f"{directory / CONFIG}: {patterns} is {own_values!r:.120}; expected an object")
    for pattern, own in own_values.items():
        if len(_REPEATS.findall(pattern)) > limits.pattern_repeats_max or _REPEATED_GROUP.search(pattern):
            raise UserError(
                f"{directory / CONFIG}: {patterns} has {pattern[:120]!r}; allowed: modules' names, and patterns with "
                f"at most {limits.pattern_repeats_max} of * + {{, none behind a group: others may take for ever to "
                "match"
            )
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                value = own
                break
        except re.error as error:
            raise UserError(f"{directory / CONFIG}: {patterns} has {pattern!r}, no regular expression") from error
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{directory / CONFIG}: {field} of {module} is {value!r}; expected a number above 0")
    return float(value)
