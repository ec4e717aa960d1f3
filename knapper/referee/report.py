"""The findings, as a table for the terminal, as JSON, and as a page."""

from collections.abc import Iterator, Sequence
from typing import Any

from knapper.referee.court import GROUPS, Group, Ruling


def scores(findings: Sequence[Ruling]) -> dict[Group, tuple[int, int]]:
    """(passed, tried) of each group that passes or fails anything."""
    judged = [each for each in findings if each.outcome in ("passed", "failed", "missing")]
    return {
        group: (sum(each.outcome == "passed" for each in judged if each.group == group), count)
        for group in GROUPS
        if (count := sum(each.group == group for each in judged))
    }


def failed(findings: Sequence[Ruling]) -> bool:
    return any(each.outcome in ("failed", "missing") for each in findings)


def rows(findings: Sequence[Ruling]) -> Iterator[tuple[str, str, str, str]]:
    for each in findings:
        yield each.group, each.outcome, each.name, each.seen


def summary(findings: Sequence[Ruling]) -> str:
    return ", ".join(f"{group} {passed} of {tried}" for group, (passed, tried) in scores(findings).items())


def as_json(url: str, model: str, sdk: str, findings: Sequence[Ruling]) -> dict[str, Any]:
    return {
        "url": url, "model": model, "sdk": sdk,
        "scores": {group: {"passed": passed, "of": tried} for group, (passed, tried) in scores(findings).items()},
        "findings": [
            {
                "group": each.group, "name": each.name, "outcome": each.outcome, "seen": each.seen,
                "figures": dict(each.figures), "seconds": round(each.seconds, 3),
            }
            for each in findings
        ],
    }  # fmt: skip


def page(title: str, model: str, sdk: str, findings: Sequence[Ruling]) -> str:
    """In Markdown. Nothing that a server said can be more than text in it."""
    lines = [f"# {_plain(title)}", "", f"`{_plain(model)}`, through `tinker=={sdk}`: {summary(findings)}.", ""]
    for group in GROUPS:
        found = [each for each in findings if each.group == group]
        if not found:
            continue
        lines += [f"## {group.capitalize()}", "", "| check | | what was seen |", "|---|---|---|"]
        lines += [f"| {_plain(each.name)} | {each.outcome} | {_plain(each.seen)} |" for each in found]
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """On one line, in one cell."""
    kept = " ".join(text.split())
    for sign in "\\`*_[]<>|":
        kept = kept.replace(sign, f"\\{sign}")
    return kept
