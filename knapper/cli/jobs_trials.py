"""The trials of a sweep, for the terminal: a table of all, and a line for each as it ends."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from knapper.cli.tables import table


def lines(job: Mapping[str, Any]) -> Iterator[str]:
    """One line for each trial, the best of them marked; nothing for a job that is no sweep."""
    if not (shown := job.get("trials")) or not shown["trials"]:
        return
    fields = list(shown["trials"][0]["values"])
    best = None if shown["best"] is None else shown["best"]["trial"]
    header = ("", "JOB", *fields, "STATE", "STEP", "DEVICE S", shown["metric"], "")
    rows = [_row(trial, fields, best) for trial in shown["trials"]]
    yield from table(header, rows)


def _row(trial: Mapping[str, Any], fields: Sequence[str], best: int | None) -> tuple[str, ...]:
    return (
        "*" if trial["trial"] == best else "",
        trial["job"],
        *(text_of(trial["values"][field]) for field in fields),
        trial["state"],
        str(trial["step"]),
        _number(trial["device_seconds"], ".2f"),
        _number(trial["value"], ".6g"),
        trial["reason"],
    )


def ended(job: Mapping[str, Any], known: set[int]) -> Iterator[str]:
    """A line for each trial that has ended and is not among the known ones, which it then is."""
    shown = job.get("trials") or {"trials": []}
    for trial in shown["trials"]:
        if trial["device_seconds"] is None or trial["trial"] in known:
            continue
        known.add(trial["trial"])
        values = "  ".join(f"{field} {text_of(value)}" for field, value in trial["values"].items())
        worth = f"{shown['metric']} {_number(trial['value'], '.6g')}" if trial["value"] is not None else trial["reason"]
        yield f"{trial['job']}  {trial['state']}  {worth}  {values}"


def text_of(value: object) -> str:
    """A value of a field, short."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
