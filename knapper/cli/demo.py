"""`knapper demo`: the examples that travel with the package, in this process. They are programs of a client."""

import importlib
import sys
from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None, typer.Option(help="Base model: a name, or a directory; default: SmolLM2-135M-Instruct.")
    ] = None,
    events: Annotated[
        bool, typer.Option("--events", help="Train by a job: a folder put into the inbox, and no client.")
    ] = False,
) -> None:
    """Train a small real model here and show what it learned, in some minutes; curves and figures go to ./out."""
    from knapper.local.package_root import deployables

    # First, as others too call a package "examples"; the SDK and matplotlib, which they import, come with an extra.
    sys.path.insert(0, str(deployables()))
    program = importlib.import_module("examples.demo_events" if events else "examples.demo")
    program.main(*([model] if model else []))
