"""Checkpoints of which one part is a language model: where config.json and the names of tensors have it.

Loads no torch. The sources are transformers' `configuration_<model_type>.py` and `conversion_mapping.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from knapper.engine.models.fields import Raw
from knapper.engine.models.mlp import MixtureNames
from knapper.errors import UserError

PREPROCESSOR: Final = "preprocessor_config.json"
BODY: Final = "model.language_model"  # the decoder's place in transformers' model of a composite

# How files name the decoder's tensors: in transformers' present order, and in the older one that most have.
_PREFIXES: Final = {f"{BODY}.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
# And how Nemotron's do.
_USUAL: Final = {
    "backbone.embeddings.": "model.embed_tokens.",
    "model.embeddings.": "model.embed_tokens.",
    "backbone.": "model.",
}
_OTHER_PARTS: Final = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector", "mm_projector", "visual", "mtp")
)
_OF_THE_WHOLE: Final = ("tie_word_embeddings", "eos_token_id", "quantization_config")


class UnsupportedText(UserError):
    """The decoder does not compute the text part of a composite, and nobody else does: a damaged text_config, too."""

    code = "unsupported_model"


@dataclass(frozen=True)
class Composite:
    """One `model_type` whose text part the native decoder computes. `models`: well-known ones, for docs/models.md.

    `texts`: the architecture, by the `model_type` that text_config has, or None where it is silent. `silent`: what a
    text_config means by the fields that it lacks. `flat`: a config.json without text_config has its fields itself.
    `experts`: how files name those of a layer, where they do it in another way than those of text alone. `images`:
    knapper.engine.images computes what the checkpoint has for images.
    """

    model_type: str
    models: str
    texts: Mapping[str | None, str]
    silent: Raw = field(default_factory=dict)
    flat: bool = False
    experts: MixtureNames | None = None
    images: bool = False

    def axes(self, raw: Raw, directory: Path) -> tuple[int, int, int] | None:
        """How many rotary pairs turn by the time, height and width of a row's position; None if images are not served:
        the text part alone, or a checkpoint without what cuts images into patches.
        """
        sees = self.images and isinstance(raw.get("vision_config"), Mapping) and (directory / PREPROCESSOR).is_file()
        if not sees:
            return None
        text = raw["text_config"]
        stated = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        sections = stated.get("mrope_section", [24, 20, 20])
        whole = isinstance(sections, list) and len(sections) == 3 and all(type(each) is int for each in sections)
        if not whole or 2 * sum(sections) != text.get("head_dim", 128) or min(sections) < 0:
            raise UnsupportedText(
                f"{directory}/config.json: mrope_section is {sections!r}; expected three numbers, the half of head_dim "
                "together"
            )
        return sections[0], sections[1], sections[2]

    def text(self, raw: Raw, directory: Path) -> dict[str, Any]:
        """The config.json of the text part alone. Raises UnsupportedText for one that is missing or of another kind."""
        found = raw if self.flat and "text_config" not in raw else raw.get("text_config")
        if not isinstance(found, Mapping):
            raise UnsupportedText(
                f"{directory}/config.json: text_config is {found!r}; expected an object, the language model's fields"
            )
        kind = None if found is raw else found.get("model_type")
        if kind not in self.texts:
            known = ", ".join(repr(each) for each in self.texts if each is not None)
            raise UnsupportedText(
                f"{directory}/config.json: text_config has model_type {kind!r}; supported in {self.model_type}: {known}"
            )
        whole = {name: raw[name] for name in _OF_THE_WHOLE if raw.get(name) is not None}
        ropes = {name: _plain(found[name]) for name in ("rope_scaling", "rope_parameters") if name in found}
        return {**self.silent, **found, **ropes, **whole, "model_type": self.texts[kind]}


def _plain(rope: object) -> object:
    """Without the three axes of positions in images: in a text they are equal, and the rotation is the plain one."""
    if not isinstance(rope, Mapping):
        return rope
    return {name: value for name, value in rope.items() if value != "mrope"}


def vision_name(stored: str) -> str | None:
    """The name that a tensor has in the vision tower of Qwen3-VL; None for one of another part."""
    for prefix in ("model.visual.", "visual."):
        if stored.startswith(prefix):
            return stored.removeprefix(prefix)
    return None


def text_name(stored: str) -> str | None:
    """The name that a tensor has in a model of text alone; None for one of another part."""
    if stored.startswith(_OTHER_PARTS):
        return None
    return _renamed(usual_name(stored), _PREFIXES)


def usual_name(stored: str) -> str:
    """The name that a tensor has in most models of text, where a family has its own."""
    return _renamed(stored, _USUAL)


def _renamed(stored: str, prefixes: Mapping[str, str]) -> str:
    for prefix, plain in prefixes.items():
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored
