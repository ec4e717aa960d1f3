"""No completion scores by anything but being right. Each cheat stands beside what is right, which scores 1."""

from typing import Any

import pytest

from tests.rewards.conftest import Scorer

RIGHT = "def f(x):\n    if x < 0: raise ValueError(x)\n    return x + 1"

# Tests that a wrong program could pass by an exception that Python itself takes for an end, or for nothing.
SWALLOWING = {
    "map": "assert all(got == n + 1 for n, got in enumerate(map(f, range(3))))",
    "zip": "for got, want in zip(map(f, [1, 2]), [2, 3]):\n    assert got == want",
    "filter": "assert all(map(lambda n: f(n) == n + 1, filter(lambda n: f(n) > n, [1, 2])))",
    "takewhile": "import itertools\nassert set(itertools.takewhile(lambda n: f(n) == n + 1, [1, 2])) <= {1, 2}",
    "iter": "for got in iter(lambda: f(1), 2):\n    assert got == 2",
    "a sequence": "class Gots:\n def __getitem__(self, n):\n  if n == 2: raise IndexError\n  return f(n)\n"
                  "for n, got in enumerate(Gots()): assert got == n + 1",
    "hasattr": "class Got:\n    @property\n    def right(self): assert f(1) == 2\nhasattr(Got(), 'right')",
}  # fmt: skip
ENDS = ["StopIteration", "StopAsyncIteration", "GeneratorExit", "IndexError", "AttributeError", "SystemExit"]


@pytest.mark.parametrize("tests", SWALLOWING.values(), ids=SWALLOWING.keys())
def test_an_exception_that_python_swallows_passes_no_test(tests: str, scores: Scorer) -> None:
    raising = [f"def f(x): raise {name}" for name in ENDS]
    late = "def f(x):\n    if x: raise StopIteration\n    return x + 1"
    found = scores({"name": "python_tests"}, *((program, tests) for program in [RIGHT, *raising, late]))
    assert [score.value for score in found] == [1] + [0] * 7


EXPECTS_AN_ERROR = "try:\n    f(-1)\nexcept Exception:\n    pass\nelse:\n    raise AssertionError"
NO_ERRORS = {
    "it leaves": "import os\ndef f(x): os._exit(0)",
    "it exits": "def f(x): raise SystemExit(0)",
    "it hangs": "def f(x):\n    while True: pass",
    "it is empty": "",
    "it has another name": "def g(x): raise ValueError",
    "it is no Python": "def f(:",
    "it cannot be loaded": "def f(x): raise ValueError\nraise ValueError",
    "it leaves while it is loaded": "import os\ndef f(x): raise ValueError\nos._exit(0)",
    "it says nonsense": "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, b'nonsense')\n"
                        "        except OSError: pass",
    "it answers too much": "def f(x): return 'x' * 10 ** 8",
}  # fmt: skip


@pytest.mark.parametrize("tests", [EXPECTS_AN_ERROR, EXPECTS_AN_ERROR.replace(" Exception", "")])
def test_what_ends_is_no_error_that_a_test_expects(tests: str, scores: Scorer) -> None:
    described = {"name": "python_tests", "timeout_s": 0.5}
    found = scores(described, *((program, tests) for program in [RIGHT, *NO_ERRORS.values()]))
    assert dict(zip(["right", *NO_ERRORS], (score.value for score in found), strict=True)) == {
        "right": 1,
        **dict.fromkeys(NO_ERRORS, 0),
    }


def test_an_error_that_is_expected_can_be_expected_in_every_way(scores: Scorer) -> None:
    ways = [
        "try: f(-1)\nexcept ValueError as error: assert str(error) == '-1'\nelse: assert False",
        "import contextlib\nwith contextlib.suppress(ValueError): f(-1)",
        "import unittest\nunittest.TestCase().assertRaises(ValueError, f, -1)",
        "def raises(kind, given):\n    try: f(given)\n    except kind: return True\nassert raises(ValueError, -1)",
    ]
    found = scores({"name": "python_tests"}, (RIGHT, ways), ("def f(x): return x + 1", ways[:1]))
    assert [score.value for score in found] == [1, 0]


COMPARED_WITH_NAN = [
    "if abs(f(1) - 2) > 1e-9: raise AssertionError",
    "assert not abs(f(1) - 2) > 1e-9",
    "assert max(0.0, abs(f(1) - 2)) < 1e-9",
    "assert not any(abs(got - want) > 1e-9 for got, want in zip(f([1]), [2]))",
]


@pytest.mark.parametrize("tests", COMPARED_WITH_NAN)
def test_nan_is_not_what_is_asked_for(tests: str, scores: Scorer) -> None:
    right = "def f(x): return [2] if isinstance(x, list) else 2"
    nans = ["float('nan')", "[float('nan')]", "complex(0, float('nan'))"]
    found = scores(
        {"name": "python_tests"}, *((text, tests) for text in [right, *(f"def f(x): return {n}" for n in nans)])
    )
    assert [score.value for score in found] == [1, 0, 0, 0]


def test_nan_is_right_where_the_test_asks_for_it(scores: Scorer) -> None:
    tests = "import math\nassert math.isnan(f(0))"
    found = scores({"name": "python_tests"}, ("def f(x): return float('nan')", tests), ("def f(x): return 0", tests))
    assert [score.value for score in found] == [1, 0]


def test_asserts_are_never_off(scores: Scorer) -> None:
    """And arguments that a program changes are its own."""
    program = "import sys\nsys.flags\ndef f(x):\n    x.clear()\n    return x"
    tests = "given = [2, 1]\nassert f(given) == sorted(given)"
    assert [score.value for score in scores({"name": "python_tests"}, (program, tests), ("f = sorted", tests))] == [
        0,
        1,
    ]


OTHERS: list[tuple[dict[str, Any], Any, str, list[str]]] = [
    ({"name": "numeric"}, 5, "5", ["1e99995", "1e400", "-1e400", "5" * 401, "inf", "nan", "1e5", "5e400"]),
    ({"name": "numeric"}, 1e308, "1e308", ["5", "1e309", "-1e308", "1e307"]),
    ({"name": "maths"}, "2x+1", "$2x+1$", ["2", "1", "$2$", "$2x$"]),
    ({"name": "maths"}, "1e400", "1e400", ["1", "5", "1e399", "400"]),
    ({"name": "maths"}, "4", "4", ["4e400", "4e1", "\\boxed{4, 5}", "\\boxed{5} or \\boxed{4} or \\boxed{3}"]),
    ({"name": "sql", "database": "t.sql"}, "select a from t where a > 9", "select a from t where a > 8",
     ["", "-- nothing", ";", "select a, a from t where 0", "select 1"]),
    ({"name": "sql", "database": "t.sql"}, [], "select a from t where a > 8", ["", "/* */", "select 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("described", "answer", "right", "wrong"), OTHERS)
def test_what_is_not_the_answer_scores_nothing(
    described: dict[str, Any], answer: Any, right: str, wrong: list[str], scores: Scorer
) -> None:
    found = scores(
        described, *((text, answer) for text in [right, *wrong]), t_sql="create table t (a); insert into t values (1)"
    )
    assert [score.value for score in found] == [1] + [0] * len(wrong)
