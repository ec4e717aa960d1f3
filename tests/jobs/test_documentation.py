"""docs/jobs.md has every field of job.yaml with its default, and none that is not there."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from knapper.catalogue.conversations import SPEAKERS
from knapper.jobs import spec
from knapper.jobs.rows import FORMS
from knapper.jobs.spec import TYPES, JobSpec, Kind
from knapper.jobs.spec_part import SpecPart

PAGE = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()


def section(name: str) -> str:
    return PAGE.partition(f"\n### {name}\n")[2].partition("\n### ")[0].partition("\n## ")[0]


def documented(name: str) -> dict[str, str]:
    """Field -> default."""
    return dict(
        re.findall(
            r"^\| `([\w.]+)` \| .*? \| (.+?) \| .*\|$",
            section(name),
            flags=re.MULTILINE,
        )
    )


def fields(struct: Any, inside: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for field in msgspec.structs.fields(struct):
        nested = next(
            (each for each in (field.type, *get_args(field.type)) if _is_part(each)),
            None,
        )
        if nested is not None:
            found |= fields(nested, f"{inside}{field.name}.")
        else:
            found[f"{inside}{field.name}"] = _default(field)
    return found


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, SpecPart)


def _default(field: Any) -> str:
    if field.default is not msgspec.NODEFAULT:
        return "none" if field.default is None else json.dumps(field.default).strip('"')
    if field.default_factory is not msgspec.NODEFAULT:
        return json.dumps(field.default_factory())
    return "required"


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_is_on_the_page_with_its_default(kind: Kind) -> None:
    told = documented("Every kind") | documented(kind)
    there = fields(TYPES[kind])
    assert set(told) == set(there)
    for name, default in there.items():
        said = told[name].strip("`")
        if default not in ("none",):
            assert said.partition(" ")[0] == default, name


def test_what_is_common_to_all_is_told_once() -> None:
    assert set(documented("Every kind")) - {"kind"} == set(fields(JobSpec))


def test_the_example_of_the_page_is_a_job() -> None:
    example = PAGE.partition("```yaml\n")[2].partition("```")[0]
    assert spec.parse(example.encode()).job.kind == "rl"


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "episodes"])  # nothing of which is held out
def test_the_example_of_the_best_step_belongs_to_every_kind(kind: Kind) -> None:
    example = PAGE.partition("\n### The best step\n")[2].partition("```yaml\n")[2].partition("```")[0]
    reward = "reward: {name: exact_match}\n" if kind == "rl" else ""
    job = spec.parse(f"kind: {kind}\ndata: d\nsteps: 90\n{reward}{example}".encode()).job
    assert (job.keep, job.stop_early) == ("best", spec.StopEarly(patience=3, min_delta=0.001))


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_of_a_row_is_on_the_page(kind: Kind) -> None:
    of_kind = PAGE.partition("\n| kind | row |\n")[2].partition(f"\n| `{kind}` | ")[2]
    told = re.match(r"[^\n]*(?:\n\| \| [^\n]*)*", of_kind)
    assert told is not None
    assert re.findall(r"(?:^|\| )`(\{.*?)`[;:]? ?[^`]*\|$", told[0], re.MULTILINE) == [
        form.shown for form in FORMS[kind]
    ]


def test_every_speaker_that_is_understood_is_on_the_page() -> None:
    (told,) = re.findall(r"`from` and `value`: (.*?)\. Others", PAGE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", told)) == set(SPEAKERS)
