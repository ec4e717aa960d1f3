"""The architectures that the native decoder computes, from the files of `families`.

A file there with `ARCHITECTURES` is all that a new one needs here; `COMPOSITES` has the checkpoints of which one is a
part. Loads no torch.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Final

from knapper.engine.models import families
from knapper.engine.models.architecture import Architecture
from knapper.engine.models.composite import Composite

_FILES: Final = [
    import_module(f"{families.__name__}.{name}")
    for name in sorted(module.name for module in pkgutil.iter_modules(families.__path__))
]


def _architectures() -> dict[str, Architecture]:
    rows = [row for file in _FILES for row in file.ARCHITECTURES]
    assert len({row.model_type for row in rows}) == len(rows), "a model_type is in two rows"
    return {row.model_type: row for row in rows}


ARCHITECTURES: Final[Mapping[str, Architecture]] = _architectures()


def _composites() -> dict[str, Composite]:
    rows: list[Composite] = [row for file in _FILES for row in getattr(file, "COMPOSITES", ())]
    assert len({row.model_type for row in rows} - ARCHITECTURES.keys()) == len(rows), "a model_type is in two rows"
    assert {text for row in rows for text in row.texts.values()} <= ARCHITECTURES.keys(), "a text that none computes"
    return {row.model_type: row for row in rows}


COMPOSITES: Final[Mapping[str, Composite]] = _composites()


def table() -> str:
    """The table of docs/models.md."""
    head = "| model type | models | beside plain Llama | linears with LoRA |\n|---|---|---|---|\n"
    rows = (
        f"| `{row.model_type}` | {row.models} | {row.described} | {', '.join(map(_short, row.sites))} |\n"
        for row in ARCHITECTURES.values()
    )
    return head + "".join(rows)


def composite_table() -> str:
    """The table of docs/models.md of checkpoints whose text part is served."""
    head = "| model type | checkpoints | computed as |\n|---|---|---|\n"
    rows = (
        f"| `{row.model_type}` | {row.models} | {', '.join(sorted(set(row.texts.values())))}"
        f"{', with images' if row.images else ''} |\n"
        for row in COMPOSITES.values()
    )
    return head + "".join(rows)


def _short(site: str) -> str:
    return site.removesuffix("_proj")
