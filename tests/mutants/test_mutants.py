"""The tool itself: its mutations are what they say, and it tells what a test notices from what none does."""

import ast
import re
import subprocess
import sys

import pytest

from tests.mutants.__main__ import sample, source_of, why_equivalent
from tests.mutants.modules import EQUIVALENT, MODULES
from tests.mutants.mutations import mutations
from tests.mutants.trial import ROOT

SOURCE = '''
"""A docstring."""
LIMIT = 3

@decorated(4)
def larger(a: int, b: int = 2) -> bool:
    """Another."""
    if not a <= b:
        raise ValueError("not this sentence")
    note(a, b, kept=True)
    return max(a, b) > -1 and a + b != 0.5
'''
SAID = [
    "3 -> 4", "3 -> 2", "2 -> 3", "2 -> 1", "not (not a <= b)", "not a <= b without its Not", "LtE -> Lt", "LtE -> Gt",
    "without raise ValueError('not this sentence')", "without note(a, b, kept=True)",
    "note(a, b, kept=True) with its first two swapped", "note(a, b, kept=True) without kept", "True -> False",
    "return None", "And -> Or", "Gt -> GtE", "Gt -> LtE", "max -> min", "-1 without its USub", "1 -> 2", "1 -> 0",
    "NotEq -> Eq", "Add -> Sub", "0.5 -> 1.0", "0.5 -> -0.5",
]  # fmt: skip


def test_each_mutation_is_one_small_change_and_prose_is_left_alone() -> None:
    made = mutations("a.py", SOURCE)
    assert sorted(each.said for each in made) == sorted(SAID)
    assert [each.number for each in made] == list(range(len(made)))
    plain = ast.unparse(ast.parse(SOURCE))
    changed = {ast.unparse(each.apply(SOURCE)) for each in made}
    assert len(changed) == len(made), "no two are the same"
    assert plain not in changed
    assert {each.function for each in made} == {0, 5}, "the function begins with its decorator"


def test_the_tests_that_must_notice_are_there() -> None:
    named = {each for tests in MODULES.values() for each in (*tests.first, *tests.then)}
    assert {each for each in named if not (ROOT / each).exists()} == set()


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", MODULES)
def test_mutations_of_a_module_compile(path: str, stride: int) -> None:
    source = source_of(path)
    for each in mutations(path, source)[::stride]:
        compile(each.apply(source), path, "exec")


def test_what_nobody_could_tell_is_there_and_is_left_out_of_samples() -> None:
    named = {
        (each.path, source_of(each.path).splitlines()[each.line - 1].strip(), each.said)
        for path in MODULES
        for each in mutations(path, source_of(path))
    }
    assert not set(EQUIVALENT) - named, "these lines have changed: look at them again"
    every = sample(1, 0, "", None)
    assert len(every) > 2000
    assert not any(why_equivalent(each) for each in every)
    assert [each.name for each in sample(1, 40, "", None)] == [each.name for each in sample(1, 40, "", None)]


@pytest.mark.parametrize(
    ("path", "said", "verdict"),
    [("knapper/ids.py", "Lt -> LtE", "killed"), ("knapper/engine/training/optimizer.py", "1e-09 -> 2e-09", "survived")],
)
def test_it_tells_what_a_test_notices_from_what_none_does(path: str, said: str, verdict: str) -> None:
    [mutation] = [each for each in mutations(path, source_of(path)) if each.said == said and each.line < 130][:1]
    command = [sys.executable, "-m", "tests.mutants", "--only", mutation.name]
    tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert re.search(rf"^{verdict} +{path}:{mutation.line}  {re.escape(said)}$", tried.stdout, re.MULTILINE), (
        tried.stdout
    )
    assert tried.returncode == (0 if verdict == "killed" else 1)
