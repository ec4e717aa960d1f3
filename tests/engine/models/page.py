"""The tables of docs/models.md: from the registry, and from what the tests compare.

`python -m tests.engine.models.page` writes them.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from knapper.engine.models import registry
from knapper.engine.models.config import HEAD, Facts, ModelConfig
from knapper.engine.models.layer import LatentAttention
from knapper.engine.models.mlp import FeedForward, Mixture
from knapper.engine.models.recurrent import GatedDelta, Mamba2, ShortConvolution
from knapper.engine.models.rotary import LongScaling, Rope
from knapper.engine.models.transformers_loader import load
from tests.engine.strange import FOREIGN, NATIVE, strange_model

_RECURRENT: Final = {ShortConvolution: "convolutions", GatedDelta: "the gated delta rule", Mamba2: "Mamba 2"}
PAGE: Final = Path(__file__).parents[3] / "docs" / "models.md"


def written(page: str) -> str:
    """`page` with the tables as they must be."""
    tables = {
        "| model type | models |": registry.table(),
        "| model type | checkpoints |": registry.composite_table(),
        "| model type | compared": compared(),
        "| class |": foreign(),
    }
    for head, table in tables.items():
        start = page.index(head)
        page = page[:start] + table + page[page.index("\n\n", start) + 1 :]
    return page


def compared() -> str:
    """The configurations in which each native architecture is compared with transformers and PEFT."""
    options: dict[str, list[str]] = {model_type: [] for model_type in registry.ARCHITECTURES}
    for kind in NATIVE:
        with tempfile.TemporaryDirectory() as directory:
            config = ModelConfig.read(strange_model(Path(directory), kind))
        options[config.model_type].append("; ".join(_options(config)) or "plain")
    rows = (f"| `{model_type}` | {' / '.join(found)} |\n" for model_type, found in options.items())
    return (
        "| model type | compared in these configurations, each of two layers, or of one of each kind |\n|---|---|\n"
        + "".join(rows)
    )


def _options(config: ModelConfig) -> Iterator[str]:
    mixers = config.attention
    if config.recurrent:
        mixer = config.recurrent[0]
        biased = " with biases" if isinstance(mixer, ShortConvolution) and mixer.biased else ""
        yield f"a layer of {_RECURRENT[type(mixer)]}{biased}"
    if windows := sum(mixer.scores.window is not None for mixer in mixers):
        yield f"a window in {'one layer' if windows == 1 else 'both layers'}"
    if isinstance(mixers[0], LatentAttention):
        yield "latent attention"
        yield "queries of the residual itself" if mixers[0].q_rank is None else "queries of latents"
    if any(mixer.sinks for mixer in mixers):
        yield "sinks"
    if any(mixer.rope is None for mixer in mixers):
        yield "a layer without positions"
    ropes: list[Rope] = [mixer.rope for mixer in mixers if mixer.rope is not None]
    if len(set(ropes)) > 1:
        yield "two kinds of rotary positions"
    yield from dict.fromkeys(_scaled(rope) for rope in ropes if rope.scaling is not None)
    if any(rope.width < mixers[0].head_dim for rope in ropes):
        yield "a part of each head rotated"
    if mixers[0].scores.cap is not None:
        yield "caps"
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, Mixture)]
    if mixtures:
        yield _experts(mixtures[0])
    if mixtures and any(isinstance(layer.mlp, FeedForward) for layer in config.layers):
        yield "a dense layer"
    if config.tied:
        yield "a tied head"


def _experts(mixture: Mixture) -> str:
    routing, groups = mixture.routing, mixture.routing.groups
    parts = {
        f"{routing.active} of {routing.experts} experts": True,
        f"of {groups and groups.active} of {groups and groups.count} groups": groups is not None and groups.count > 1,
        "and a shared one": mixture.shared is not None,
        "computing in fewer numbers": mixture.latent is not None,
        "their weights renormalised": routing.renormalised,
    }
    return ", ".join(part for part, has in parts.items() if has)


def _scaled(rope: Rope) -> str:
    name = type(rope.scaling).__name__.removesuffix("Scaling")
    return "LongRoPE" if isinstance(rope.scaling, LongScaling) else f"scaled positions ({name})"


def foreign() -> str:
    """The architectures that are compared with PEFT through transformers, and their linears with LoRA."""
    rows = []
    for kind, (class_name, _) in FOREIGN.items():
        with tempfile.TemporaryDirectory() as directory:
            model = load(strange_model(Path(directory), kind), torch.float32, torch.device("cpu"))
        rows.append(f"| `{class_name.removesuffix('Config')}` | {_kind(kind)} | {', '.join(_sites(model.config))} |\n")
    return "| class | configuration | linears with LoRA |\n|---|---|---|\n" + "".join(rows)


def _kind(kind: str) -> str:
    values = FOREIGN[kind][1]
    options = {
        "sliding_window": "windows", "mlp_bias": "`mlp_bias`", "logit_scale": "a scaled head",
        "final_logit_softcapping": "caps",
    }  # fmt: skip
    return "; ".join(words for name, words in options.items() if name in values) or "plain"


def _sites(facts: Facts) -> list[str]:
    names = dict.fromkeys(target.name.rpartition(".")[2] for target in facts.lora_targets if target.name != HEAD)
    return [name for name in names if not name.isdigit()]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
