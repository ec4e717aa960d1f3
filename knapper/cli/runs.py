"""`knapper runs`: what the runs of the SDK's clients and of jobs do, in a terminal."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from knapper import limits
from knapper.cli.tables import Json, LogTo, listing
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.cli.runs_client import RunsClient

app = typer.Typer(
    name="runs", help="List, show, watch, compare and delete training runs.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip

Url = Annotated[str | None, typer.Option(help="The gateway; default: TINKER_BASE_URL, or http://127.0.0.1:8000.")]
Run = Annotated[str, typer.Argument(help="The run's id, as `knapper runs list` shows it.")]
Metrics = Annotated[list[str], typer.Option("--metric", help="A metric to draw; may be given several times.")]


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many to print.")] = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the newest runs, and how many alarms each has."""
    from knapper.cli.runs_client import overview

    runs = _client(url).runs(limit)
    listing(runs, list(overview(runs)), "there are no runs; a training client or a job makes one", as_json=as_json)


@app.command()
def show(run: Run, metric: Metrics = [], url: Url = None, as_json: Json = False) -> None:  # noqa: B006  # typer copies it
    """Print a run's state, its alarms and its curves."""
    from knapper.cli.runs_client import curves, metrics_of, summary

    client = _client(url)
    described, progress = client.run(run), client.progress(run)
    lines = summary(described, progress)
    drawn = curves(progress["points"], metrics_of(progress["points"], metric))
    listing(described | progress, [*lines, *drawn], "", as_json=as_json)


@app.command()
def watch(
    run: Run,
    steps: Annotated[
        int | None, typer.Option(min=1, help="End at this step, and say until then when that may be.")
    ] = None,
    log_to: LogTo = [],  # noqa: B006  # typer copies it
    url: Url = None,
) -> None:
    """Print each step and alarm as it comes, and what the run waits for, until Ctrl-C."""
    import time

    from knapper.cli import sinks
    from knapper.cli.runs_watcher import RunWatcher

    client = _client(url)
    client.run(run)  # before anything is made for it
    forwarder = sinks.Forwarder([sinks.opened(address, run) for address in log_to])
    try:
        RunWatcher(client, run, steps, time.monotonic, forwarder).watch()
    finally:
        forwarder.close()


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="The runs' ids, up to eight.")],
    metric: Annotated[str, typer.Option(help="What to compare.")] = "loss/mean",
    url: Url = None,
) -> None:
    """Draw one metric of several runs on one scale."""
    from knapper.cli.runs_client import comparison

    if len(runs) > limits.console_compared_max:
        raise typer.BadParameter(f"{len(runs)} runs; allowed: {limits.console_compared_max}", param_hint="RUNS")
    client = _client(url)
    say(*comparison({run: client.progress(run) for run in runs}, metric))


def _client(url: str | None) -> "RunsClient":
    from knapper.cli.runs_client import RunsClient

    return RunsClient(
        url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000",
        os.environ.get("TINKER_API_KEY") or "tml-local",
    )
