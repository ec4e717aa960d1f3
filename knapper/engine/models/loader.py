"""Loads a model directory: in native layer code if the registry has the architecture, else through transformers."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from knapper.engine.layers import gated_delta, state_space
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.models import weights
from knapper.engine.models.base import Model
from knapper.engine.models.config import ModelConfig, bounded_context, computed_by
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.fields import UnsupportedModel
from knapper.engine.models.recurrent import GatedDelta, Mamba2, ShortConvolution
from knapper.engine.models.weight_files import vision_entries


def expect_architecture(directory: Path) -> None:
    """Raises UnsupportedModel for an architecture that neither computes, as far as config.json shows."""
    if computed_by(directory) == "transformers":
        from knapper.engine.models import transformers_loader as models_transformers_loader

        models_transformers_loader.expect_structure(directory)


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    exactness: Exactness | None = None,
    context: int = 0,
    linear: type[FrozenLinear] = FrozenLinear,
    made: weights.Made | None = None,
) -> Model:
    """The model in `directory`, in `dtype` on `device`; `exactness` records how its products keep their bits. Of its
    context it serves `context` tokens; 0: all. `linear` and `made`: of `weights.load`, for native layers in shards,
    which serve no images.

    Raises InvalidField for more than those, NotFound for missing files, BrokenModel for wrong ones, UnsupportedModel
    for a model that neither computes.
    """
    try:
        config = ModelConfig.read(directory)
    except UnsupportedModel as not_native:
        # Imported only here: that takes longer than the rest of a native model's start.
        from knapper.engine.models import transformers_loader

        try:
            model = transformers_loader.load(directory, dtype, torch.device(device))
        except UnsupportedModel as refused:
            raise UnsupportedModel(f"{refused} (not computed natively either: {not_native})") from refused
        model.bound_context(bounded_context(model.config.context, context))
        return model
    config = replace(config, context=bounded_context(config.context, context))
    exactness = exactness or Exactness()
    tower = None
    if vision_entries(directory) and made is None:
        from knapper.engine.images.tower import VisionTower  # it imports transformers, as above

        tower = VisionTower(directory, dtype, torch.device(device))
    decoder = Decoder(config, weights.load(directory, config, dtype, device, exactness, linear, made), tower)
    if exactness.probes(decoder.device):
        for recurrent in set(config.recurrent):
            match recurrent:
                case GatedDelta() as facts:
                    exactness.check(f"delta rule {facts}", partial(gated_delta.is_invariant, facts, decoder.device))
                case Mamba2() as facts:
                    exactness.check(f"state space {facts}", partial(state_space.is_invariant, facts, decoder.device))
                case ShortConvolution():
                    pass  # sums of single elements
    return decoder
