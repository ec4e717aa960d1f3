"""A PEFT directory of LoRA, read as what it adds to each linear.

R rank, I inputs, O outputs, E experts. Whatever this cannot read exactly it refuses, with the reason. A pair of all
experts, of target_parameters, is read as a pair for each.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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
_WRAPPED: Final = ".base_layer"  # PEFT's name of what it wrapped first, of two parameters of a block
_AROUND: Final = "down_proj"  # which of the two it wraps around the other
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
    """The two matrices of a linear, A (R, I) and B (O, R), by their names in the file: y += scale * (x @ A.T) @ B.T.

    `expert`: (number, E) of an expert whose matrices the file has among those of all: A (E R, I) and B (O, R E).
    """

    module: str
    a: str
    b: str
    rank: int
    inputs: int
    outputs: int
    scale: float
    expert: tuple[int, int] | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """`pairs`: by the module's name in transformers, of an expert with its number before the last part.

    `base_model`: as the adapter names it, perhaps empty.
    """

    directory: Path
    base_model: str
    pairs: Mapping[str, Pair]
    _last: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # what all experts are cut from

    def matrices(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A and B in float32, A with the scale in it."""
        a_RI, b_OR = self.stored(pair)
        return a_RI * pair.scale, b_OR

    def stored(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A and B as they are, in float32."""
        if pair.expert is None:
            return self._tensor(pair.a).float(), self._tensor(pair.b).float()
        if not {pair.a, pair.b} <= self._last.keys():
            self._last.clear()
            self._last.update({name: self._tensor(name) for name in (pair.a, pair.b)})
        number, experts = pair.expert
        a_RI = self._last[pair.a][number * pair.rank : (number + 1) * pair.rank]
        return a_RI.float(), self._last[pair.b][:, number::experts].float()

    def _tensor(self, name: str) -> Tensor:
        file = weight_files.opened(self.directory / WEIGHTS, "pt")
        tensor: Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]  # the library has no types here
        return tensor


def read(directory: Path) -> PeftAdapter:
    """The adapter in the directory. Raises UserError for one that is not there, damaged, or more than LoRA."""
    config = _config(directory)
    for option, plain in _PLAIN.items():
        if option in config and config[option] not in plain:
            raise UserError(
                f"{directory / CONFIG}: {option} is {json.dumps(config[option])[:120]}; allowed: "
                f"{' or '.join(map(json.dumps, plain))}. Only plain LoRA is read exactly"
            )
    parameters = _Parameters.read(directory, config)
    pairs = {
        pair.module: pair
        for module, found in sorted(_sides(directory / WEIGHTS).items())
        for pair in _pairs(directory, module, found, config, parameters)
    }
    return PeftAdapter(directory, str(config.get("base_model_name_or_path") or ""), pairs)


@dataclass(frozen=True)
class _Parameters:
    """What target_parameters names: `linears`, weights of linears, and `blocks`, of all experts, by the ends of their
    modules' names; of a block (the parameter that PEFT wraps first, the one that it wraps around it).
    """

    linears: tuple[str, ...]
    blocks: Mapping[str, tuple[str | None, str]]

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any]) -> "_Parameters":
        found = config.get("target_parameters") or []
        if not isinstance(found, list) or not all(isinstance(each, str) and "." in each for each in found):
            raise UserError(f"{directory / CONFIG}: target_parameters is {found!r:.120}; expected names of parameters")
        linears, blocks = [], dict[str, list[str]]()
        for each in dict.fromkeys(found):
            module, _, parameter = each.rpartition(".")
            if parameter == "weight":
                linears.append(module)
            else:
                blocks.setdefault(module, []).append(parameter)
        for block, own in blocks.items():
            if len(own) > 2 or (len(own) == 2 and _AROUND not in own):
                raise UserError(
                    f"{directory / CONFIG}: target_parameters has {', '.join(own)} of {block}; allowed: one of a "
                    f"block, or two of which one is {_AROUND}"
                )
            own.sort(key=_AROUND.__eq__)
        return cls(
            tuple(linears), {block: (own[0] if len(own) == 2 else None, own[-1]) for block, own in blocks.items()}
        )

    def named(self, module: str) -> tuple[str, str] | None:
        """(block, parameter) of a module of the file that is a pair of all experts."""
        block = module.removesuffix(_WRAPPED)
        for end, (first, around) in self.blocks.items():
            if _ends_in(block, end):
                parameter = around if block == module else first
                return None if parameter is None else (block, parameter)
        return None

    def key(self, module: str) -> str:
        """What PEFT's patterns are compared with."""
        return f"{module}.weight" if any(_ends_in(module, each) for each in self.linears) else module


def _ends_in(module: str, end: str) -> bool:
    return f".{module}".endswith(f".{end}")


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


def _pairs(
    directory: Path,
    module: str,
    sides: Mapping[str, tuple[str, list[int]]],
    config: Mapping[str, Any],
    parameters: _Parameters,
) -> list[Pair]:
    """One, or one for each expert."""
    if set(sides) != {"A", "B"}:
        raise UserError(f"{directory / WEIGHTS}: {module} has lora_{next(iter(sides))} alone; expected A and B")
    (a, (rank, inputs)), (b, (outputs, rank_of_b)) = sides["A"], sides["B"]
    of_experts = parameters.named(module)
    key = parameters.key(module) if of_experts is None else ".".join(of_experts)
    promised = _promised(directory, "r", "rank_pattern", key, config)
    experts, rest = (1, 0) if of_experts is None else divmod(rank, promised)
    if not rank == rank_of_b == promised * experts or rest:
        raise UserError(
            f"{directory}: {module} has A of rank {rank} and B of rank {rank_of_b}; {CONFIG} makes it {promised:g}"
            f"{'' if of_experts is None else ' for each expert'}"
        )
    alpha, own = _promised(directory, "lora_alpha", "alpha_pattern", key, config), int(promised)
    scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
    if of_experts is None:
        return [Pair(module, a, b, own, inputs, outputs, scale)]
    block, parameter = of_experts
    return [
        Pair(f"{block}.{number}.{parameter}", a, b, own, inputs, outputs, scale, (number, int(experts)))
        for number in range(int(experts))
    ]


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
