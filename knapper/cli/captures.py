"""`knapper capture`: agents' sessions that were kept token for token."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knapper import limits
from knapper.cli import jobs
from knapper.cli.tables import Json, listing
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.cli.captures_client import CapturesClient

app = typer.Typer(
    name="capture", help="List, show, score, delete and train on captured episodes.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip

Url = Annotated[str | None, typer.Option(help="The gateway; default: TINKER_BASE_URL, or http://127.0.0.1:8000.")]
Episode = Annotated[str, typer.Argument(help="EPISODE or GROUP/EPISODE, as `knapper capture list` shows it.")]


@app.command("list")
def list_episodes(
    limit: Annotated[int, typer.Option(min=1, max=limits.page_max, help="How many to print.")] = 100,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the newest episodes, with their turns, bytes and scores, and how many there are."""
    from knapper.cli.captures_client import overview

    answer = _client(url).page(limit, 0)
    empty = "there are no episodes; a request with the header X-Knapper-Capture begins one"
    listing(answer["episodes"], list(overview(answer)), empty, as_json=as_json)


@app.command()
def show(episode: Episode, url: Url = None, as_json: Json = False) -> None:
    """Print an episode's turns, and as JSON their token ids and log-probabilities."""
    from knapper.cli.captures_client import summary

    shown = _client(url).episode(episode)
    listing(shown, list(summary(shown)), "", as_json=as_json)


@app.command()
def score(
    episode: Episode,
    score: Annotated[
        float, typer.Argument(min=-limits.episode_score_max, max=limits.episode_score_max, help="What it was worth.")
    ],
    url: Url = None,
) -> None:
    """Say what an episode was worth, in place of what was said before."""
    say(f"episode {episode} scored: {_client(url).score(episode, score)['score']:g}")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="The job's name.")],
    group: Annotated[list[str], typer.Option("--group", help="Only episodes of this group; several: each.")] = [],  # noqa: B006  # typer copies it
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the episodes.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, max=1, help="Of AdamW.")] = 1e-4,
    rank: Annotated[int, typer.Option(min=1, max=limits.rank_max, help="Of the adapter.")] = 16,
    follow: Annotated[bool, typer.Option("--follow", help="Print each step until the job ends.")] = False,
    to: Annotated[
        Path | None, typer.Option(help="Write job.yaml and its data into this new folder, and submit nothing.")
    ] = None,
    url: Url = None,
) -> None:
    """Train an adapter on the scored episodes, as a job: submit it, or write its folder to edit and submit."""
    from tempfile import TemporaryDirectory

    from knapper.cli.captures_job import write
    from knapper.jobs import names

    with TemporaryDirectory() as place:
        folder = to or Path(place) / names.chosen(name)
        folder.mkdir(parents=True)
        found = write(_client(url), folder, group, epochs=epochs, learning_rate=learning_rate, rank=rank)
        say(found, file=sys.stderr)
        if to is None:
            jobs.submit(folder, name, follow, url=url)


@app.command()
def delete(episodes: Annotated[list[str], typer.Argument(help="EPISODE or GROUP/EPISODE.")], url: Url = None) -> None:
    """Delete episodes for good."""
    client = _client(url)
    for episode in episodes:
        say(f"episode {episode} deleted: {client.delete(episode)['turns']} turns")


def _client(url: str | None) -> "CapturesClient":
    from knapper.cli.captures_client import CapturesClient

    return CapturesClient(
        url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000",
        os.environ.get("TINKER_API_KEY") or "tml-local",
    )
