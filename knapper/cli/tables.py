"""Listings: columns for people, or with `--json` one JSON value for programs; and options of several commands."""

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from knapper.text.printable import say

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

LogTo = Annotated[
    list[str],
    typer.Option(
        help="Forward each step: tensorboard:DIRECTORY, trackio:PROJECT or wandb:PROJECT; may be given several times. "
        "Started again, it goes on where it stopped."
    ),
]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The header and the rows, in columns; the last column is not padded."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def listing(value: object, lines: Sequence[str], empty: str, *, as_json: bool) -> None:
    """Print `lines`, or `empty` if there are none; `as_json`: print `value` instead.

    JSON is pure ASCII: anything that could affect a terminal is escaped.
    """
    if as_json:
        import json

        say(*json.dumps(value, indent=2, allow_nan=False).splitlines())
    else:
        say(*(lines or [empty]))


def utc(at: float) -> str:
    """Seconds since the epoch as ISO 8601."""
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"
