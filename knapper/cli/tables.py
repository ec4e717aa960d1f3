"""What listings print: columns for people, or with `--json` one JSON value for programs."""

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from knapper.text.printable import say

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line for the header and for each row, in columns; the last one is as wide as it is."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def listing(value: object, lines: Sequence[str], empty: str, *, as_json: bool) -> None:
    """Print `lines`, or what to know and do where there are none; `as_json`: print `value` in their place.

    JSON is ASCII alone: whatever could change a terminal is escaped.
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
