"""SmolLM3: Llama in which every few layers go without positions (NoPE, arXiv 2501.18795)."""

from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, Windows
from knapper.engine.models.fields import Raw
from knapper.engine.models.rotary import RopeRule


def _without_positions(raw: Raw, index: int) -> bool:
    rotates = raw.get("no_rope_layers")  # 1 for a layer that rotates, in spite of the name
    if rotates is None:
        return (index + 1) % int(raw.get("no_rope_layer_interval", 4)) == 0
    return not rotates[index]


def _unreadable_layers(raw: Raw) -> str:
    """Before the layers are taken from it."""
    layers, rotates = raw.get("num_hidden_layers"), raw.get("no_rope_layers")
    if rotates is not None and not (isinstance(rotates, list) and len(rotates) == layers):
        return f"no_rope_layers {rotates!r} (only a list of {layers})"
    interval = raw.get("no_rope_layer_interval", 4)
    return "" if isinstance(interval, int) and interval > 0 else f"no_rope_layer_interval {interval!r} (only 1 or more)"


ARCHITECTURES: Final = (
    Architecture(
        "smollm3",
        "SmolLM3",
        refused=(*OPTIONS, _unreadable_layers),
        without_positions=_without_positions,
        windows=Windows(_without_positions, switched=True),
        rope=RopeRule(theta=2000000.0),
        tied=True,
    ),
)
