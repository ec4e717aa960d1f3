"""`knapper import`: a PEFT adapter of any training becomes a checkpoint of this deployment."""

import os
from pathlib import Path
from typing import Annotated

import typer

from knapper.text.printable import say


def import_adapter(
    adapter: Annotated[Path, typer.Argument(help="A PEFT directory.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="The checkpoint's name; default: the directory's.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base model, as it is served: a name, or a directory; default: the adapter's own."),
    ] = None,
    tenant: Annotated[str, typer.Option(help="The tenant that owns it.")] = "local",
    data: Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")] = None,
) -> None:
    """Make a PEFT adapter a checkpoint that trains and samples. A server may run meanwhile."""
    import asyncio
    import time

    from knapper import ids
    from knapper.catalogue.download import is_name, obtain
    from knapper.engine.models.config import ModelConfig
    from knapper.export import adapter as peft
    from knapper.export import imported
    from knapper.settings import Settings, variable
    from knapper.store.factory import open_store

    settings = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    asked = model or peft.read(adapter).base_model
    base = obtain(asked, settings.cache, say)
    served = asked if is_name(asked) and not Path(asked).is_dir() else str(base)
    found = imported.read(adapter, ModelConfig.read(base), served, ids.tenant(tenant))
    chosen = ids.checkpoint_name(name or adapter.resolve().name, "--name")
    for path in asyncio.run(imported.store(found, chosen, open_store(settings), time.time)):
        say(str(path))
    if found.rescaled:
        say(
            f"{len(found.rescaled)} modules have a scale of their own, which is now in their B: the model is the same, "
            f"and training takes steps of another size there: {', '.join(found.rescaled[:3])}"
        )
