"""Where a base model's files have the linears of experts that they keep in one tensor for all of them.

E experts, O outputs, I inputs.
"""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from knapper.engine.models.config import ModelConfig
from knapper.engine.models.fields import UnsupportedModel
from knapper.engine.models.mlp import Mixture
from knapper.errors import NotFound


@dataclass(frozen=True)
class Place:
    """A part of the tensor `name`: of one expert, `outputs` rows from `start` on; `turned`: columns, of (E, I, O)."""

    name: str
    expert: int
    start: int
    outputs: int
    turned: bool


def places(base: Path, having: Container[str]) -> dict[str, Place]:
    """By an expert's linear, as adapters name it in a model of text alone. `having`: the base's tensors, likewise.

    Empty for a model whose files have each linear by itself, and for one that transformers computes.
    """
    try:
        config = ModelConfig.read(base)
    except (UnsupportedModel, NotFound):
        return {}
    found: dict[str, Place] = {}
    for index, layer in enumerate(config.layers):
        if not isinstance(layer.mlp, Mixture):
            continue
        names, starts = layer.mlp.names, dict[str, int]()
        for linear in layer.mlp.linears(config.hidden):
            joined = f"model.layers.{index}.{linear.joined}"
            if linear.experts is None or linear.joined is None or joined not in having:
                continue
            start = starts.get(joined, 0)
            starts[joined] = start + linear.outputs
            block, _, parameter = linear.joined.rpartition(".")
            pattern = f"{block}.{{}}.{parameter}" if linear.whole or linear.together else linear.module
            for expert in range(linear.experts):
                module = f"model.layers.{index}.{pattern.format(expert)}"
                found[module] = Place(joined, expert, start, linear.outputs, names.turned or names.whole)
    return found
