"""docs/migration.md: what it says of others has a source, and what it says of knapper is so."""

import re

import msgspec
import pytest

from knapper import limits
from knapper.engine.training.losses import LOSSES
from knapper.jobs.spec import RlJob
from tests.documents.pages import read

PAGE = read("docs/migration.md")
SECTIONS = dict(re.findall(r"^## (From .+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_said_of_another_service_links_its_own_pages(name: str) -> None:
    assert len(re.findall(r"\]\(https://", SECTIONS[name])) >= 2
    assert "**Different:**" in SECTIONS[name]


def test_the_four_services_are_there() -> None:
    assert len(SECTIONS) == 4


def test_its_numbers_are_ours() -> None:
    (works,) = re.findall(r"\[(\d+ of \d+) with their tests\]\(compatibility\.md\)", PAGE)
    assert works in " ".join(read("docs/compatibility.md").split())
    assert f"rank over {limits.rank_max}" in " ".join(PAGE.split())
    assert f"{ {6: 'six'}[len(LOSSES)] } losses are served" in " ".join(PAGE.split())


def test_the_fields_of_a_job_exist() -> None:
    cells = re.findall(r"^\| `?.*? \| (`.*) \|$", SECTIONS["From Prime Intellect's shared LoRA service"], re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([a-z_.]+)`", cell) if name != "job.yaml"]
    assert len(named) == 8
    for name in named:
        kind = RlJob
        for part in name.split("."):
            fields = {each.encode_name: each.type for each in msgspec.structs.fields(kind)}
            assert part in fields, name
            kind = fields[part]
