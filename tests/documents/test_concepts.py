"""docs/concepts.md: one meaning a word, and the journal's names are those that the code makes."""

import re

from knapper.ids import RunId
from knapper.state import layout
from knapper.state.layout import run_prefix
from tests.documents.pages import block, read

PAGE = "docs/concepts.md"


def test_the_journals_names_are_those_of_the_layout() -> None:
    shown = [line.split()[0] for line in block(PAGE, "runs/<hash>-<run>/in/").text.splitlines()]
    run = RunId("ses-0:train:0")
    made = [layout.operation(run, 7), layout.commit(run, 7), layout.manifest(run, 7), layout.snapshot(run, 7, 1)]
    assert len(shown) == len(made) + 1, "the last is an adapter's, which has no number"
    for name, line in zip(made, shown, strict=False):
        beginning, _, rest = line.partition("<hash>-<run>")
        assert name.startswith(run_prefix(run))
        assert run_prefix(run).startswith(beginning)
        written = "/" + name.removeprefix(run_prefix(run))
        assert re.fullmatch(re.sub("<(seq|n)>", "[0-9]+", rest.replace("...", ".*")), written), (line, name)


def test_each_word_is_explained_once() -> None:
    words = [
        word.strip().lower()
        for heading in re.findall(r"^\*\*([^*]+)\.\*\*", read(PAGE), flags=re.MULTILINE)
        for word in heading.split(",")
    ]
    assert len(words) >= 25
    assert len(set(words)) == len(words)
