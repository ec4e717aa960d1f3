"""`knapper referee`. It imports what it needs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.referee.court import Check, Court


def referee(
    url: Annotated[str, typer.Argument(help="The server, as TINKER_BASE_URL would name it.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Base model; default: the first that the server names.")] = None,
    key: Annotated[str | None, typer.Option(help="Default: TINKER_API_KEY, or tml-local.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="methods, semantics, exactness, durability or speed; several times.")
    ] = None,
    kill: Annotated[
        str | None,
        typer.Option(help="A command that kills the server, which must then come back: without it, no durability."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="Of log-probabilities that should be equal, in nats.")
    ] = 0.02,
    patience: Annotated[int, typer.Option(min=1, max=3600, help="Seconds for each check.")] = 120,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the findings as JSON, too.")] = None,
    page_to: Annotated[Path | None, typer.Option("--page", help="Write them as a page in Markdown, too.")] = None,
    title: Annotated[str, typer.Option(help="The page's first line.")] = "Referee",
) -> None:
    """Score a server of Tinker's protocol through the SDK. Exit status 1 if a check fails."""
    from time import monotonic

    import tinker

    from knapper.cli.tables import table
    from knapper.referee import report
    from knapper.referee.court import Court, tried

    checks = _chosen(only)
    key = key or os.environ.get("TINKER_API_KEY") or "tml-local"
    ending = None if kill is None else shlex.split(kill)
    court = Court(
        url, key, model or "", monotonic, tolerance, float(patience),
        None if ending is None else lambda: _kill(ending),
    )  # fmt: skip
    court.model = model or _first_model(court)
    say(f"{court.model} at {url}, {len(checks)} checks, through tinker {tinker.__version__}")
    findings = []
    for finding in tried(court, checks):
        findings.append(finding)
        say(f"{finding.outcome:>9}  {finding.group}: {finding.name}", file=sys.stderr)
    say(*table(("GROUP", "", "CHECK", "SEEN"), list(report.rows(findings))), "", report.summary(findings))
    if json_to is not None:
        found = report.as_json(url, court.model, tinker.__version__, findings)
        json_to.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if page_to is not None:
        page_to.write_text(report.page(title, court.model, tinker.__version__, findings), encoding="utf-8")
    sys.stdout.flush()
    os._exit(1 if report.failed(findings) else 0)  # threads of checks that nobody answered would wait for ever


def _chosen(only: list[str] | None) -> "list[Check]":
    from knapper.errors import InvalidField
    from knapper.referee import durability, exactness, methods, semantics, speed
    from knapper.referee.court import CHECKS, GROUPS

    assert all((methods, semantics, exactness, durability, speed)), "importing them adds their checks"
    for group in only or ():
        if group not in GROUPS:
            raise InvalidField("--only", group, ", ".join(GROUPS))
    return sorted(
        (each for each in CHECKS if not only or each.group in only), key=lambda each: GROUPS.index(each.group)
    )


def _first_model(court: "Court") -> str:
    from knapper.errors import InvalidField

    models = [
        each.model_name for each in court.rest.get_server_capabilities().result().supported_models if each.model_name
    ]
    if not models:
        raise InvalidField("--model", None, "a model's name, as the server names none")
    return str(models[0])


def _kill(command: list[str]) -> None:
    """A command that does not work says nothing of the server."""
    from knapper.referee.court import NotTried

    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotTried(f"--kill: {error}") from error
