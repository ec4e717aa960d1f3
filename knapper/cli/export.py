"""`knapper export`: a checkpoint as a PEFT directory, merged, as GGUF, for Ollama, or on a hub."""

import os
from pathlib import Path
from typing import Annotated

import typer

from knapper.text.printable import say


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="tinker://RUN/KIND/NAME, a job's name, or a PEFT directory.", show_default=False)
    ],
    peft: Annotated[bool, typer.Option("--peft", help="The adapter alone, as PEFT loads it; the default.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="A model directory: the base with the adapter in it.")
    ] = False,
    gguf: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE", help="A GGUF file of this type, such as q8_0 or q4_k_m; may be given several times."
        ),
    ] = None,
    ollama: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A Modelfile, and `ollama create NAME`; of the first --gguf, or q8_0."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPOSITORY", help="Upload what is exported, as HF_TOKEN's owner.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="The repository that is made on the hub is public.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write; default: the checkpoint's name.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model: a name, or a directory; default: the adapter's own.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="llama.cpp's sources, with its converter; default: what is on PATH.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The gateway; default: TINKER_BASE_URL, or http://127.0.0.1:8000.")
    ] = None,
) -> None:
    """Write a checkpoint in a form that others load. What an interrupted export finished is not done again."""
    from knapper.cli.jobs_client import JobsClient
    from knapper.export.order import ExportOrder, carry_out

    order = ExportOrder(
        checkpoint, peft=peft or not (merged or gguf or ollama), merged=merged, gguf=tuple(gguf or ()), ollama=ollama,
        repository=push_to_hub, public=public, out=out, base=base, llama_cpp=llama_cpp,
    )  # fmt: skip
    client = JobsClient(
        url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000",
        os.environ.get("TINKER_API_KEY") or "tml-local",
    )
    from knapper.cli import checkpoint_files
    from knapper.settings import Settings

    def fetch(named: str, wanted: tuple[str, ...], folder: Path) -> str:
        return checkpoint_files.fetch(client, checkpoint_files.path_of(client, named), wanted, folder, say)

    carry_out(order, fetch, Settings.load(os.environ).cache, say)
