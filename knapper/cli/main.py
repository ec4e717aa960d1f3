"""The `knapper` command. What a subcommand needs is imported inside it, so that `--help` answers at once."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import knapper
from knapper.cli import chaos as chaos
from knapper.cli import deploy
from knapper.cli import jobs as jobs
from knapper.cli.tables import Json, listing, utc
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.state.api_keys import Keys
    from knapper.state.gc.collector import Collector
    from knapper.store import Store

app = typer.Typer(
    name="knapper",
    help="Fine-tuning that costs nothing while it sleeps.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
key = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
app.add_typer(key, name="key")
runs = typer.Typer(help="Delete training runs.", no_args_is_help=True)
app.add_typer(runs, name="runs")
app.add_typer(jobs.app, name="jobs")
app.command()(jobs.submit)
app.command()(jobs.usage)
app.add_typer(deploy.app, name="deploy")
app.command()(deploy.doctor)
app.command()(chaos.chaos)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(knapper.__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    model: Annotated[str | None, typer.Option(help="Base model: a name, or a directory.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The gateway's port; 0: any free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Where the gateway listens.")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory of everything that must survive.")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"] | None, typer.Option(help="Of the base weights.")] = None,
    idle: Annotated[float | None, typer.Option(help="Seconds without work after which the engine ends.")] = None,
    isolated: Annotated[bool, typer.Option("--isolated", help="One process for each function.")] = False,
) -> None:
    """Serve the Tinker API on this machine until Ctrl-C. Defaults: see `knapper settings`."""
    from knapper.local.package_root import deployables
    from knapper.local.supervisor import up
    from knapper.observability import logs
    from knapper.settings import Settings, variable

    given = {"model": model, "port": port, "host": host, "data": data, "dtype": dtype, "idle_s": idle}
    flags = {variable(name): str(value) for name, value in given.items() if value is not None}
    settings = Settings.load({**os.environ, **flags})
    logs.configure("up", settings.log_level)
    up(settings, deployables(), os.environ, isolated=isolated)


@app.command()
def sweep(data: Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")] = None) -> None:
    """Delete at once what a gateway deletes by itself: whatever is needed no more. A server may run meanwhile."""
    import asyncio
    import time

    from knapper.store import forget_torn_writes

    collector, store = _collector(data)

    async def sweep_and_tell() -> None:
        swept = await collector.sweep()
        for session, count in swept.items():
            say(f"{session}: {count} objects deleted")
        torn = await forget_torn_writes(store, time.time())
        if torn:
            say(f"torn writes: {torn} objects deleted")
        if not swept and not torn:
            say("there is nothing to delete: everything is needed")

    asyncio.run(sweep_and_tell())


@app.command()
def verify(data: Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")] = None) -> None:
    """Read every object of the store and name those that are damaged; ends with 1 then. A server may run meanwhile."""
    import asyncio

    from knapper.settings import Settings, variable
    from knapper.state import inventory
    from knapper.store.factory import open_store

    store = open_store(Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})}))

    async def read_all() -> tuple[int, int]:
        read = wrong = 0
        async for done, errors in inventory.unreadable(store):
            read, wrong = done, wrong + len(errors)
            for error in errors:
                say(f"{error.code}: {error}")
        return read, wrong

    read, wrong = asyncio.run(read_all())
    say(f"{read} objects are read; {wrong or 'none'} cannot be used")
    raise typer.Exit(1 if wrong else 0)


def _collector(data: Path | None) -> "tuple[Collector, Store]":
    """Of this deployment, and its store."""
    import secrets
    import time
    from functools import partial

    from knapper.jobs import needs
    from knapper.settings import Settings, variable
    from knapper.state.gc.collector import Collector
    from knapper.state.gc.lookups import Retention
    from knapper.state.ledger import Accounts
    from knapper.store.factory import open_store

    settings = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    store = open_store(settings)
    keep = Retention.of(settings)
    account = Accounts(store, time.time, time.monotonic, lambda: secrets.token_hex(16)).account
    return Collector(store, keep, time.time, time.monotonic, partial(needs.of, store), account), store


Data = Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")]


@runs.command("delete")
def delete_run(
    run: Annotated[str, typer.Argument(help="The run's id, as `tinker run list` shows it.")], data: Data = None
) -> None:
    """Delete a training run, whosever it is, with its checkpoints; a server may run meanwhile. There is no way back."""
    import asyncio

    from knapper import ids

    collector, _ = _collector(data)
    tenant, count = asyncio.run(collector.delete_of_any_tenant(ids.run_id(run)))
    say(f"training run {run} of tenant {tenant} is deleted: {count} objects")


@key.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Whose objects it opens: small letters, digits and '-'.")],
    note: Annotated[str, typer.Option(help="What it is for, as `knapper key list` shows it.")] = "",
    data: Data = None,
) -> None:
    """Make a key and print it, once: the store keeps a hash. It is good at once."""
    import asyncio
    import secrets

    from knapper import ids

    made, record = asyncio.run(_keys(data).create(ids.tenant(tenant), note, lambda: secrets.token_hex(32)))
    say(f"key {record.id} of tenant {tenant}, not shown again; its user sets TINKER_API_KEY to it:", file=sys.stderr)
    say(made)


@key.command("list")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """Print the keys there are and were: id, tenant, when each was made, whether it is good, and its note."""
    import asyncio

    rows, lines = [], []
    for each in asyncio.run(_keys(data).listed()):
        made, revoked = utc(each.created_at), utc(each.revoked_at) if each.revoked_at else None
        rows.append(
            {"id": each.id, "tenant": each.tenant, "created_at": made, "revoked_at": revoked, "note": each.note}
        )
        state = f"revoked {revoked}" if revoked else "good"
        lines.append(f"{each.id}  {each.tenant}  {made}  {state}  {each.note}".rstrip())
    listing(rows, lines, "there are no keys; `knapper key create TENANT` makes one", as_json=as_json)


@key.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The key's id, not the key.")], data: Data = None) -> None:
    """End a key for good. Gateways refuse it, and tokens that were issued for it, within a second."""
    import asyncio

    record = asyncio.run(_keys(data).revoke(key_id))
    say(f"key {record.id} of tenant {record.tenant} is revoked")


def _keys(data: Path | None) -> "Keys":
    import time

    from knapper.settings import Settings, variable
    from knapper.state.api_keys import Keys
    from knapper.store.factory import open_store

    settings = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    return Keys(open_store(settings), time.time)


@app.command()
def dead_letters(data: Data = None, as_json: Json = False) -> None:
    """List events that nobody could deliver: when, what, for whom, and what that one said."""
    import asyncio

    from knapper.settings import Settings, variable
    from knapper.state import dead_letters as state_dead_letters
    from knapper.store.factory import open_store

    loaded = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    rows, lines = [], []
    for letter in asyncio.run(state_dead_letters.listed(open_store(loaded))):
        told, when = letter.attributes.get, utc(letter.kept_at)
        rows.append({"kept_at": when, **letter.attributes})
        lines.append(f"{when}  {told('type', '?')}  {told('subject', '')}  id {told('id', '?')}")
        lines.append(
            f"    to {told('knativeerrordest', '?')}: {told('knativeerrorcode', '?')} {told('knativeerrordata', '')}"
        )
    listing(rows, lines, "there are no dead letters: every event was delivered", as_json=as_json)


@app.command()
def settings(as_json: Json = False) -> None:
    """Print every setting: its variable, its value, where that comes from, and why it exists."""
    from knapper.settings import describe

    rows, lines = [], []
    for line in describe(os.environ):
        rows.append({"variable": line.variable, "value": line.value, "source": line.source, "reason": line.reason})
        lines += [f"{line.variable}={line.value}  ({line.source})", f"    {line.reason}"]
    listing(rows, lines, "", as_json=as_json)


@app.command()
def version() -> None:
    """Print the version."""
    say(knapper.__version__)


def main() -> None:
    """The border of the process: what a user can mend becomes one line, a defect keeps its traceback."""
    from knapper.cli import extras
    from knapper.errors import KnapperError

    try:
        app()
    except KnapperError as error:
        say(f"knapper: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (told := extras.refusal(error)) is None:
            raise
        say(f"knapper: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before or after the event loop heeds signals
        sys.exit(130)
