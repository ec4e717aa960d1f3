"""The `knapper` command. Subcommands import what they need, so that `--help` answers at once."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import knapper
from knapper.cli import captures, deploy, import_adapter, models, quota, runs
from knapper.cli import chaos as chaos
from knapper.cli import demo as demo
from knapper.cli import export as export
from knapper.cli import jobs as jobs
from knapper.cli import referee as referee
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
app.add_typer(runs.app, name="runs")
app.add_typer(captures.app, name="capture")
app.add_typer(quota.app, name="quota")
app.add_typer(jobs.app, name="jobs")
app.command()(jobs.submit)
app.command()(jobs.usage)
app.add_typer(deploy.app, name="deploy")
app.command()(deploy.doctor)
app.command()(chaos.chaos)
app.command()(referee.referee)
app.command()(demo.demo)
app.command()(export.export)
app.command()(models.models)
app.command("import")(import_adapter.import_adapter)


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
    model: Annotated[
        list[str] | None, typer.Option(help="Base model: a name, or a directory. Several: each as --model.")
    ] = None,
    models: Annotated[Path | None, typer.Option(help="A file of base models, a line each; # begins a comment.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The gateway's port; 0: any free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address the gateway listens on.")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory of all data that must survive restarts.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None, typer.Option(help="Dtype of the base weights.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, max=64, help="Devices that the base model is spread over, a process each.")
    ] = None,
    idle: Annotated[float | None, typer.Option(help="Idle seconds after which the engine ends.")] = None,
    isolated: Annotated[bool, typer.Option("--isolated", help="Run each function in its own process.")] = False,
) -> None:
    """Serve the Tinker API on this machine until Ctrl-C. Defaults: see `knapper settings`."""
    from knapper.local import base_model
    from knapper.local.package_root import deployables
    from knapper.local.supervisor import up
    from knapper.observability import logs
    from knapper.settings import Settings, variable

    options = {"port": port, "host": host, "data": data, "dtype": dtype, "devices": devices, "idle_s": idle}
    flags = {variable(name): str(value) for name, value in options.items() if value is not None}
    settings = Settings.load({**os.environ, **flags})
    logs.configure("up", settings.log_level)
    named = [*(model or []), *(base_model.listed(models) if models else [])]
    up(settings, deployables(), os.environ, named or [settings.model], isolated=isolated)


@app.command()
def sweep(data: Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")] = None) -> None:
    """Delete unreferenced objects now, instead of waiting for the gateway. A server may run meanwhile."""
    import asyncio
    import time

    from knapper.store import forget_torn_writes

    collector, store = _collector(data)

    async def sweep_and_print() -> None:
        swept = await collector.sweep()
        for session, count in swept.items():
            say(f"{session}: {count} objects deleted")
        torn = await forget_torn_writes(store, time.time())
        if torn:
            say(f"torn writes: {torn} objects deleted")
        if not swept and not torn:
            say("nothing to delete: every object is needed")

    asyncio.run(sweep_and_print())


@app.command()
def verify(data: Annotated[Path | None, typer.Option(help="The data directory of `knapper up`.")] = None) -> None:
    """Read every object of the store and list the damaged ones; exit status 1 if there are any. A server may run."""
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
    say(f"{read} objects read; {wrong or 'none'} unreadable")
    raise typer.Exit(1 if wrong else 0)


def _collector(data: Path | None) -> "tuple[Collector, Store]":
    """The collector of this deployment, and its store."""
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


@runs.app.command("delete")
def delete_run(
    run: Annotated[str, typer.Argument(help="The run's id, as `tinker run list` shows it.")], data: Data = None
) -> None:
    """Delete a training run of any tenant, with its checkpoints, for good. A server may run meanwhile."""
    import asyncio

    from knapper import ids

    collector, _ = _collector(data)
    tenant, count = asyncio.run(collector.delete_of_any_tenant(ids.run_id(run)))
    say(f"training run {run} of tenant {tenant} deleted: {count} objects")


@key.command("create")
def create_key(
    tenant: Annotated[
        str, typer.Argument(help="The tenant whose objects it opens: lower-case letters, digits and '-'.")
    ],
    note: Annotated[str, typer.Option(help="A note that `knapper key list` shows.")] = "",
    data: Data = None,
) -> None:
    """Make a key and print it once; the store keeps only its hash. It is valid at once."""
    import asyncio
    import secrets

    from knapper import ids

    made, record = asyncio.run(_keys(data).create(ids.tenant(tenant), note, lambda: secrets.token_hex(32)))
    say(f"key {record.id} of tenant {tenant}, not shown again; its user sets TINKER_API_KEY to it:", file=sys.stderr)
    say(made)


@key.command("list")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """Print all keys, revoked ones too: id, tenant, creation time, state and note."""
    import asyncio

    rows, lines = [], []
    for record in asyncio.run(_keys(data).listed()):
        made, revoked = utc(record.created_at), utc(record.revoked_at) if record.revoked_at else None
        rows.append(
            {"id": record.id, "tenant": record.tenant, "created_at": made, "revoked_at": revoked, "note": record.note}
        )
        state = f"revoked {revoked}" if revoked else "valid"
        lines.append(f"{record.id}  {record.tenant}  {made}  {state}  {record.note}".rstrip())
    listing(rows, lines, "there are no keys; `knapper key create TENANT` makes one", as_json=as_json)


@key.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The key's id, not the key.")], data: Data = None) -> None:
    """Revoke a key for good. Gateways refuse it, and tokens issued for it, within a second."""
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
    """List events that could not be delivered: time, type, subject, receiver and its answer."""
    import asyncio

    from knapper.settings import Settings, variable
    from knapper.state import dead_letters as state_dead_letters
    from knapper.store.factory import open_store

    loaded = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    rows, lines = [], []
    for letter in asyncio.run(state_dead_letters.listed(open_store(loaded))):
        get, when = letter.attributes.get, utc(letter.kept_at)
        rows.append({"kept_at": when, **letter.attributes})
        lines.append(f"{when}  {get('type', '?')}  {get('subject', '')}  id {get('id', '?')}")
        lines.append(
            f"    to {get('knativeerrordest', '?')}: {get('knativeerrorcode', '?')} {get('knativeerrordata', '')}"
        )
    listing(rows, lines, "there are no dead letters: every event was delivered", as_json=as_json)


@app.command()
def settings(as_json: Json = False) -> None:
    """Print every setting: its variable, value, source and meaning."""
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
    """Entry point: an error that a user can fix becomes one line, a defect keeps its traceback."""
    from knapper.cli import extras
    from knapper.errors import KnapperError

    try:
        app()
    except KnapperError as error:
        say(f"knapper: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (refusal := extras.refusal(error)) is None:
            raise
        say(f"knapper: {refusal}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before or after the event loop handles signals
        sys.exit(130)
