"""HTML from templates, in which everything is escaped, and the words that numbers have there."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.requests import Request

from gateway.console import assets
from knapper import limits
from knapper.text import durations
from knapper.text.printable import printable
from knapper.text.sizes import sized

_TEMPLATES: Final = Path(__file__).parent / "templates"


def render(template: str, *, request: Request, **values: object) -> str:
    """The page; its path says which entry of the navigation it belongs to."""
    return _environment.get_template(template).render(here=request.url.path, **values)


def prepare() -> None:
    """Compile what the first page is made of, and most others in part, before it is asked for."""
    for template in ("base.html", "tables.html", "home.html"):
        _environment.get_template(template)


def at(seconds: float) -> str:
    """A moment, for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "never"


def clip(text: object, most: int = limits.console_text_chars_max) -> str:
    """At most so many characters, and a word on how many more there are."""
    whole = printable(str(text), keep="\n\t")
    return whole if len(whole) <= most else f"{whole[:most]} … ({len(whole) - most} characters more)"


def number(value: float) -> str:
    """Few digits: a table is read, not computed with."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}".replace(",", "\u2009") if abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:.4g}"


def brief(name: str) -> str:
    """A session's or a run's id, short enough for a table: ses-0123abcd:train:0."""
    head, separator, rest = name.partition(":")
    return f"{head[:12]}{separator}{rest.removeprefix('train:').removeprefix('sample:')}"


def _made() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False,
    )  # fmt: skip
    filters: Mapping[str, Any] = {
        "at": at, "duration": durations.rounded, "clip": clip, "number": number, "brief": brief, "size": sized,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.globals["asset"] = assets.url
    environment.globals["integrity"] = assets.integrity
    return environment


_environment: Final = _made()
