"""`knapper quota ...`: what tenants may have and use. Commands import what they need."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knapper.cli.tables import Json, listing, table
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.state.quotas import QuotaBook, Quotas, Values

app = typer.Typer(
    name="quota", help="Set, show and unset tenants' quotas.", no_args_is_help=True, rich_markup_mode=None
)

Tenant = Annotated[str | None, typer.Argument(help="The tenant; without one, and with --default: all tenants.")]
Default = Annotated[bool, typer.Option("--default", help="All tenants that have no value of their own.")]
Data = Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")]


@app.command("set")
def set_quota(
    tenant: Tenant = None,
    runs: Annotated[str | None, typer.Option(help="Open training runs, such as 20.")] = None,
    bytes_: Annotated[str | None, typer.Option("--bytes", help="Of checkpoints, such as 50GiB.")] = None,
    tokens_a_day: Annotated[
        str | None, typer.Option(help="Trained, prefilled and sampled from midnight UTC, such as 10M.")
    ] = None,
    samples_in_flight: Annotated[str | None, typer.Option(help="Samples at the same time, such as 64.")] = None,
    rank: Annotated[str | None, typer.Option(help="The highest rank of an adapter, such as 32.")] = None,
    default: Default = False,
    data: Data = None,
) -> None:
    """Set fields of a quota, beside its others; `unlimited` is no limit. In force within five seconds."""
    from knapper.state import quotas

    given = {
        "runs": runs, "bytes": bytes_, "tokens_a_day": tokens_a_day, "samples_in_flight": samples_in_flight,
        "rank": rank,
    }  # fmt: skip
    values: Values = {
        name: quotas.value(name, _number(text), f"--{name.replace('_', '-')}")
        for name, text in given.items()
        if text is not None
    }
    if not values:
        raise typer.BadParameter("name at least one", param_hint="--runs, --bytes, --tokens-a-day, ...")
    whose = _whose(tenant, default)
    changed = _change(data, lambda newest: newest.changed(whose, values))
    say(*_lines(changed, [whose] if whose else []))


@app.command()
def show(tenant: Tenant = None, default: Default = False, data: Data = None, as_json: Json = False) -> None:
    """Print the quotas: all, a tenant's as they are in force, or with --default those of tenants without their own.

    What a tenant has used of them, `knapper usage` prints with the tenant's key.
    """
    import asyncio
    from dataclasses import asdict

    newest = asyncio.run(_book(data).newest())
    if tenant is None and not default:
        value: object = {"default": newest.default, "tenants": newest.tenants}
        names = sorted(newest.tenants)
    else:
        whose = _whose(tenant, default)
        value, names = asdict(newest.of(whose)), [whose] if whose else []
    is_empty = not newest.default and not newest.tenants
    empty = "there are no quotas; `knapper quota set TENANT --runs 20` sets one"
    listing(value, [] if is_empty else _lines(newest, names), empty, as_json=as_json)


@app.command()
def unset(tenant: Tenant = None, default: Default = False, data: Data = None) -> None:
    """Remove a tenant's own quota; that of all tenants holds for it then."""
    whose = _whose(tenant, default)
    changed = _change(data, lambda newest: newest.without(whose))
    say(*_lines(changed, [whose] if whose else []))


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(help="YAML or JSON: `default` and `tenants`.")], data: Data = None
) -> None:
    """Make the quotas those of a file: what it does not name has none."""
    from knapper.jobs import quota_file

    wanted = quota_file.read(file)
    changed = _change(data, lambda _: wanted)
    say(*_lines(changed, sorted(changed.tenants)))


def _whose(tenant: str | None, default: bool) -> str:
    """The tenant; empty for the default. Raises InvalidField."""
    from knapper import ids

    if (tenant is None) != default:
        raise typer.BadParameter("name one tenant, or give --default in its place", param_hint="TENANT")
    return "" if tenant is None else ids.tenant(tenant)


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 30 else text


def _book(data: Path | None) -> "QuotaBook":
    import time

    from knapper.settings import Settings, variable
    from knapper.state.quotas import QuotaBook
    from knapper.store.factory import open_store

    settings = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    return QuotaBook(open_store(settings), time.monotonic)


def _change(data: Path | None, edit: "Callable[[Quotas], Quotas]") -> "Quotas":
    import asyncio

    return asyncio.run(_book(data).change(edit))


def _lines(quotas: "Quotas", tenants: list[str]) -> list[str]:
    """A table of the quotas in force."""
    from knapper.state.quotas import FIELDS, UNLIMITED
    from knapper.text.sizes import sized

    rows = []
    for tenant in ["", *tenants]:
        values = quotas.of(tenant)
        cells = []
        for name in FIELDS:
            number = getattr(values, name)
            cells.append(UNLIMITED if number is None else sized(number) if name == "bytes" else f"{number}")
        rows.append((tenant or "(all others)", *cells))
    return list(table(("TENANT", "RUNS", "BYTES", "TOKENS A DAY", "SAMPLES IN FLIGHT", "RANK"), rows))
