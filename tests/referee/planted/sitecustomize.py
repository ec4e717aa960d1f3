"""Plants faults into a knapper that has this folder on its PYTHONPATH: PLANTED names them, separated by commas.

Each changes one thing in the code that the server really runs, when its module is imported.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any


def ppo_without_clips(losses: Any) -> None:
    def unclipped(learner_T: Any, *, logprobs: Any, advantages: Any, **_: Any) -> Any:
        return losses.importance_sampling(learner_T, logprobs=logprobs, advantages=advantages)

    losses.LOSSES["ppo"] = replace(losses.LOSSES["ppo"], formula=unclipped)


def last_gradient_alone(trainer: Any) -> None:
    trainer._added = lambda _state, sums_P: sums_P


def warmer_in_a_crowd(token_sampling: Any) -> None:
    draw = token_sampling.draw

    def drawn(logits_NV: Any, params: Any, uniforms_N: Any) -> Any:
        return draw(logits_NV * 0.9 if len(params) > 1 else logits_NV, params, uniforms_N)

    token_sampling.draw = drawn


def seeds_of_its_own(token_sampling: Any) -> None:
    drawn, uniforms = iter(range(10**9)), token_sampling.uniforms
    token_sampling.uniforms = lambda _seed, sample: uniforms(next(drawn), sample)


FAULTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "ppo_without_clips": ("knapper.engine.training.losses", ppo_without_clips),
    "last_gradient_alone": ("knapper.engine.training.trainer", last_gradient_alone),
    "warmer_in_a_crowd": ("knapper.engine.sampling.token_sampling", warmer_in_a_crowd),
    "seeds_of_its_own": ("knapper.engine.sampling.token_sampling", seeds_of_its_own),
}


class Planter(importlib.abc.MetaPathFinder):
    """Finds the modules that a fault is for, as everyone does, and changes them once they are there."""

    def __init__(self, names: Sequence[str]) -> None:
        self._faults = [FAULTS[name] for name in names]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        plants = [plant for module, plant in self._faults if module == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if plants else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def planted(module: ModuleType) -> None:
            execute(module)
            for plant in plants:
                plant(module)

        spec.loader.exec_module = planted  # type: ignore[method-assign]  # of this module's loader alone
        return spec


if names := os.environ.get("PLANTED"):
    sys.meta_path.insert(0, Planter(names.split(",")))
