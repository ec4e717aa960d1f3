"""`knapper submit`, `knapper jobs ...` and `knapper usage`. What a command needs is imported inside it."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knapper import limits
from knapper.cli.tables import Json, listing, table
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.cli.jobs_client import JobsClient

app = typer.Typer(
    name="jobs", help="List, show, fetch, cancel, resume and delete jobs.", no_args_is_help=True, rich_markup_mode=None
)

Url = Annotated[str | None, typer.Option(help="The gateway; else TINKER_BASE_URL, else http://127.0.0.1:8000.")]
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
    job_yaml: Annotated[Path, typer.Argument(help="job.yaml; the files that it names lie beside it.")],
    name: Annotated[str | None, typer.Option(help="The job's name; else its folder's.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show each step until the job ends.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Start anew, though the same files were started before.")
    ] = False,
    url: Url = None,
) -> None:
    """Start a job: send job.yaml and its files. It runs on the server, whatever becomes of this command."""
    client = _client(url)
    told = client.submit(job_yaml, name, again=again)
    if told.get("equal"):
        more = "" if told["state"] == "running" else "; --again starts them anew"
        more += ", `knapper jobs resume` goes on" if told["state"] in ("failed", "cancelled") else ""
        say(f"these files were submitted before: this is that job{more}")
    if follow and told["state"] != "refused":
        told = _follow(client, told["job"])
    _say(told)


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
        say(f"{total - len(jobs)} more; --limit tells how many to print", file=sys.stderr if as_json else None)


@app.command()
def show(
    job: Name,
    follow: Annotated[bool, typer.Option("--follow", help="Show each step until the job ends.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print a job's steps, and what became of it."""
    from knapper.cli.jobs_client import lines, summary

    if follow and as_json:
        raise typer.BadParameter("prints once, when asked; leave out --follow, or ask again", param_hint="--json")
    client = _client(url)
    if follow:
        _say(_follow(client, job))
        return
    told, metrics = client.show(job), []
    while told["metrics"]:
        metrics += told["metrics"]
        told = client.show(job, metrics[-1]["step"])
    told["metrics"] = metrics
    listing(told, [*lines(told), *summary(told)], "", as_json=as_json)
    _exit(told)


@app.command()
def cancel(job: Name, url: Url = None) -> None:
    """Stop a job; what is done stays, and `resume` goes on from there."""
    _say(_client(url).cancel(job))


@app.command()
def resume(job: Name, url: Url = None) -> None:
    """Let a cancelled or failed job go on where it stopped."""
    _say(_client(url).resume(job))


@app.command()
def delete(job: Name, url: Url = None) -> None:
    """Delete a job that does not run, for good: its files, its run with its checkpoints, its records."""
    _client(url).delete(job)
    say(f"{job}: deleted")


@app.command()
def files(job: Name, url: Url = None, as_json: Json = False) -> None:
    """List what a job has published."""
    from knapper.text.sizes import sized

    found = _client(url).files(job)
    rows = [(file["name"], sized(file["size"]), file["modified_at"][:19]) for file in found]
    lines = list(table(("FILE", "SIZE", "PUBLISHED"), rows)) if rows else []
    listing(
        found, lines, f"{job} has published nothing yet; `knapper jobs show {job}` says how far it is", as_json=as_json
    )


@app.command()
def download(
    job: Name,
    names: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="Files or folders; else all.")] = None,
    to: Annotated[Path | None, typer.Option(help="The directory to put them into; else one of the job's name.")] = None,
    url: Url = None,
) -> None:
    """Fetch a job's files: `adapter`, say, which PEFT loads. One that was cut off goes on from there."""
    from knapper.cli import jobs_transfer

    for name, fetched in jobs_transfer.download(_client(url), job, names or [], to or Path(job)):
        say(f"{(to or Path(job)) / name}{'' if fetched else ' was there already'}")


@app.command()
def rollouts(
    job: Name,
    step: Annotated[int | None, typer.Option(min=1, help="What this step was trained on; else the newest.")] = None,
    evaluation: Annotated[int | None, typer.Option(min=0, help="The held-out prompts' after so many steps.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the completions of one step, or of one evaluation, and what each was worth."""
    from knapper.cli import jobs_rollouts

    if step is not None and evaluation is not None:
        raise typer.BadParameter(
            "is of other completions than --step; leave one of them out", param_hint="--evaluation"
        )
    rows = jobs_rollouts.read(_client(url), job, step, evaluation)
    listing(rows, list(jobs_rollouts.lines(rows)), "the file has no completions", as_json=as_json)


def _follow(client: "JobsClient", job: str) -> dict[str, Any]:
    import time

    from knapper.cli.jobs_follower import Follower

    return Follower(client, job, time.monotonic).follow()


def _say(told: dict[str, Any]) -> None:
    from knapper.cli.jobs_client import summary

    for line in summary(told):
        say(line)
    _exit(told)


def _exit(told: dict[str, Any]) -> None:
    if told["state"] in ("failed", "refused"):
        sys.exit(1)


def _client(url: str | None) -> "JobsClient":
    from knapper.cli.jobs_client import JobsClient

    return JobsClient(
        url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000",
        os.environ.get("TINKER_API_KEY") or "tml-local",
    )


def usage(
    hours: Annotated[
        int, typer.Option(min=1, max=24 * limits.usage_days_max, help="How far to look back, this hour included.")
    ] = 24,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say what your runs and sessions used: tokens, and seconds of the device, which are what a GPU is paid for."""
    from datetime import UTC, datetime, timedelta

    from knapper.cli.jobs_client import used

    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    rows = used(_client(url).usage(end - timedelta(hours=hours), end))
    lines = []
    for row in rows:
        parts = [f"{row[name]:{form}} {unit}" for name, form, unit in _UNITS if name in row]
        lines.append(f"{row['about']}  {row['base_model']}: {', '.join(parts)}")
    listing(rows, lines, f"nothing was used in the last {hours} hours; --hours looks further back", as_json=as_json)
