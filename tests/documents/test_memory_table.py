"""The table of cards in docs/operating.md is what the account of memory says."""

from knapper.engine import memory_table
from tests.test_house import ROOT


def test_the_page_has_the_table_that_the_account_makes() -> None:
    page = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    assert "\n".join(memory_table.lines()) in page, "run python -m knapper.engine.memory_table, and paste its table"


def test_the_page_of_several_devices_has_its_table() -> None:
    page = (ROOT / "docs/ranks.md").read_text(encoding="utf-8")
    assert "\n".join(memory_table.spread_lines()) in page, "run python -m knapper.engine.memory_table, and paste it"
