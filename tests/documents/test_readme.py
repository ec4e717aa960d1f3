"""README's numbers are those of the code and of the pages that it links."""

import re

import pytest

from knapper.engine.training.losses import LOSSES
from tests.documents.pages import read

README = read("README.md")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_shown_with_its_defaults(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \| .* \|([^|]*)\|$", README, flags=re.MULTILINE)
    shown = dict(re.findall(r"`(\w+)` \(([\d.]+)\)", row))
    loss = LOSSES[name]
    defaults = {key: loss.default(key) for key in loss.config}
    assert {key: float(value) for key, value in shown.items()} == {k: v for k, v in defaults.items() if v is not None}
    assert all(f"`{key}`" in row for key in loss.config)
    assert ("must be given" in row) == (None in defaults.values())


def test_packages_are_counted_as_the_makefile_does() -> None:
    demo, tests = re.findall(r"\((?:.*, )?(\d+) packages", read("Makefile"))
    text = " ".join(README.split())
    assert f"installs {demo} packages" in text
    assert f"{int(tests) - int(demo)} more packages" in text


def test_the_comparison_quotes_our_own_pages_right() -> None:
    (works,) = re.findall(r"\[(\d+ of \d+)\]\(docs/compatibility\.md\)", README)
    assert works in " ".join(read("docs/compatibility.md").split())
    (kills,) = re.findall(r"\[(\d+ kills), equal bits\]\(docs/reliability\.md\)", README)
    assert f"| {kills} over a directory" in read("docs/reliability.md")
    assert f"| {len(LOSSES)}, [below](#losses) |" in README


def test_each_claim_about_another_project_links_its_source() -> None:
    rows = re.findall(r"^\| (.+) \|$", README.partition("## Beside Tinker")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 6
    for row in rows[2:]:
        for cell in row.split(" | ")[2:]:
            assert cell in ("-", "all: the SDK is its own") or "](https://" in cell, cell
