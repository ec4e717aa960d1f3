"""The architectures that the native decoder computes, from the files of `families`.

A file there with `ARCHITECTURES` is all that a new one needs here. Loads no torch.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Final

from knapper.engine.models import families
from knapper.engine.models.architecture import Architecture


def _found() -> dict[str, Architecture]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    rows = [row for name in names for row in import_module(f"{families.__name__}.{name}").ARCHITECTURES]
    assert len({row.model_type for row in rows}) == len(rows), "a model_type is in two rows"
    return {row.model_type: row for row in rows}


ARCHITECTURES: Final[Mapping[str, Architecture]] = _found()


def table() -> str:
    """The table of docs/models.md."""
    head = "| model type | models | beside plain Llama | linears with LoRA |\n|---|---|---|---|\n"
    rows = (
        f"| `{row.model_type}` | {row.models} | {row.described} | {', '.join(map(_short, row.sites))} |\n"
        for row in ARCHITECTURES.values()
    )
    return head + "".join(rows)


def _short(site: str) -> str:
    return site.removesuffix("_proj")
