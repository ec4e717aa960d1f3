"""`knapper submit`, `knapper jobs ...` and `knapper usage`. Commands import what they need."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knapper import limits
from knapper.cli.tables import Json, LogTo, listing, table
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.cli.jobs_client import JobsClient

app = typer.Typer(
    name="jobs", help="List, show, fetch, cancel, resume and delete jobs.", no_args_is_help=True, rich_markup_mode=None
)

Url = Annotated[str | None, typer.Option(help="The gateway; default: TINKER_BASE_URL, or http://127.0.0.1:8000.")]
Name = Annotated[str, typer.Argument(help="The job's name.")]
_UNITS = (
    ("tokens_trained", "d", "tokens trained"),
    ("training_device_seconds", ".3f", "device seconds"),
    ("prompt_tokens", "d", "prompt tokens"),
    ("tokens_sampled", "d", "tokens sampled"),
    ("sampling_device_seconds", ".3f", "device seconds"),
    ("checkpoints", "d", "checkpoints"),
)


def submit(
    job_yaml: Annotated[
        Path, typer.Argument(help="job.yaml, or its folder; the files it names must be beside it.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option(help="The job's name; default: the folder's.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print each step until the job ends.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Start again, although the same files were started before.")
    ] = False,
    log_to: LogTo = [],  # noqa: B006  # typer copies it
    url: Url = None,
) -> None:
    """Start a job: send job.yaml and its files. It runs on the server, even if this command ends."""
    _expect_follow(log_to, follow)
    client = _client(url)
    job_state = client.submit(job_yaml, name, again=again)
    if job_state.get("equal"):
        more = "" if job_state["state"] == "running" else "; --again starts them again"
        more += ", `knapper jobs resume` continues it" if job_state["state"] in ("failed", "cancelled") else ""
        say(f"these files were submitted before, as this job{more}")
    if follow and job_state["state"] != "refused":
        job_state = _follow(client, job_state["job"], log_to)
    _say(job_state, with_trials=follow)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=limits.jobs_listed_max, help="How many to print.")] = 100,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the newest jobs."""
    from knapper.cli.jobs_client import overview

    jobs, total = _client(url).jobs(limit)
    listing(jobs, list(overview(jobs)), "there are no jobs; `knapper submit JOB.YAML` starts one", as_json=as_json)
    if total > len(jobs):
        say(f"{total - len(jobs)} more; --limit sets how many to print", file=sys.stderr if as_json else None)


@app.command()
def show(
    job: Name,
    follow: Annotated[bool, typer.Option("--follow", help="Print each step until the job ends.")] = False,
    log_to: LogTo = [],  # noqa: B006  # typer copies it
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print a job's steps and its state."""
    from knapper.cli import jobs_trials
    from knapper.cli.jobs_client import METRICS, lines, summary
    from knapper.cli.runs_client import sparks

    if follow and as_json:
        raise typer.BadParameter("prints once; leave out --follow", param_hint="--json")
    _expect_follow(log_to, follow)
    client = _client(url)
    if follow:
        _say(_follow(client, job, log_to), with_trials=True)
        return
    job_state, metrics = client.show(job), []
    while job_state["metrics"]:
        metrics += job_state["metrics"]
        job_state = client.show(job, metrics[-1]["step"])
    job_state["metrics"] = metrics
    drawn = sparks(metrics, METRICS)
    listing(
        job_state, [*lines(job_state), *jobs_trials.lines(job_state), *drawn, *summary(job_state)], "", as_json=as_json
    )
    _exit(job_state)


@app.command()
def cancel(job: Name, url: Url = None) -> None:
    """Stop a job; finished steps are kept, and `resume` continues from there."""
    _say(_client(url).cancel(job))


@app.command()
def resume(job: Name, url: Url = None) -> None:
    """Continue a cancelled or failed job where it stopped."""
    _say(_client(url).resume(job))


@app.command()
def delete(job: Name, url: Url = None) -> None:
    """Delete a job that is not running, for good: its files, its run with its checkpoints, its records."""
    _client(url).delete(job)
    say(f"{job}: deleted")


@app.command()
def files(job: Name, url: Url = None, as_json: Json = False) -> None:
    """List the files that a job has published."""
    from knapper.text.sizes import sized

    published = _client(url).files(job)
    rows = [(file["name"], sized(file["size"]), file["modified_at"][:19]) for file in published]
    lines = list(table(("FILE", "SIZE", "PUBLISHED"), rows)) if rows else []
    listing(
        published,
        lines,
        f"{job} has published nothing yet; `knapper jobs show {job}` says how far it is",
        as_json=as_json,
    )


@app.command()
def download(
    job: Name,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="Files or folders; default: all.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Target directory; default: the job's name.")] = None,
    url: Url = None,
) -> None:
    """Download a job's files, such as `adapter`, which PEFT loads. Interrupted downloads resume."""
    from knapper.cli import jobs_transfer

    for name, fetched in jobs_transfer.download(_client(url), job, names or [], to or Path(job)):
        say(f"{(to or Path(job)) / name}{'' if fetched else ' was already there'}")


@app.command()
def rollouts(
    job: Name,
    step: Annotated[int | None, typer.Option(min=1, help="The step; default: the newest.")] = None,
    evaluation: Annotated[int | None, typer.Option(min=0, help="The evaluation after this many steps.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the completions of one step, or of one evaluation, with their rewards."""
    from knapper.cli import jobs_rollouts

    if step is not None and evaluation is not None:
        raise typer.BadParameter(
            "and --step select different completions; leave one of them out", param_hint="--evaluation"
        )
    rows = jobs_rollouts.read(_client(url), job, step, evaluation)
    listing(rows, list(jobs_rollouts.lines(rows)), "the file has no completions", as_json=as_json)


def _expect_follow(log_to: list[str], follow: bool) -> None:
    if log_to and not follow:
        raise typer.BadParameter("forwards steps while they are printed; add --follow", param_hint="--log-to")


def _follow(client: "JobsClient", job: str, log_to: list[str]) -> dict[str, Any]:
    import time

    from knapper.cli import sinks
    from knapper.cli.jobs_follower import Follower

    forwarder = sinks.Forwarder([sinks.opened(address, job) for address in log_to])
    try:
        return Follower(client, job, time.monotonic, forwarder).follow()
    finally:
        forwarder.close()


def _say(job_state: dict[str, Any], *, with_trials: bool = False) -> None:
    from knapper.cli import jobs_trials
    from knapper.cli.jobs_client import summary

    for line in [*(jobs_trials.lines(job_state) if with_trials else ()), *summary(job_state)]:
        say(line)
    _exit(job_state)


def _exit(job_state: dict[str, Any]) -> None:
    if job_state["state"] in ("failed", "refused"):
        sys.exit(1)


def _client(url: str | None) -> "JobsClient":
    from knapper.cli.jobs_client import JobsClient

    return JobsClient(
        url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000",
        os.environ.get("TINKER_API_KEY") or "tml-local",
    )


def usage(
    hours: Annotated[
        int, typer.Option(min=1, max=24 * limits.usage_days_max, help="Hours to look back, the current one included.")
    ] = 24,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print what your runs and sessions used, what it costs if the server has prices, and your quota."""
    from datetime import UTC, datetime, timedelta

    from knapper.cli.jobs_client import captured_lines, quota_lines, used

    client = _client(url)
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    answer, quota = client.usage(end - timedelta(hours=hours), end), client.quota()
    rows, currency = used(answer["data"]), answer.get("currency")
    lines = []
    for row in rows:
        parts = [f"{row[name]:{form}} {unit}" for name, form, unit in _UNITS if name in row]
        if "cost" in row:
            parts.append(f"{row['cost']:.4f} {currency}")
        lines.append(f"{row['about']}  {row['base_model']}: {', '.join(parts)}")
    if currency is not None:
        stored = sum(row.get("monthly_cost", 0.0) for row in client.storage())
        lines.append(f"total: {answer['total_cost']:.4f} {currency}; checkpoints: {stored:.4f} {currency} a month")
    lines += [*quota_lines(quota), *captured_lines(client.captured())]
    empty = f"nothing was used in the last {hours} hours; --hours looks further back"
    listing(rows, lines if rows else [empty, *lines], "", as_json=as_json)
