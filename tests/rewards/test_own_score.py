"""Whatever a completion is, it fails nobody but itself: it scores 0, and the reason is told."""

import json
import re
from typing import Any

import pytest

from knapper.rewards.scorer import RewardFailed
from tests.rewards.conftest import Scorer

ODD = [
    "", "\0", "\ud800", "\udfff1", "1" * 401, "9" * 5000, "1e400", "-1e400", "[" * 3000, "{\"a\":" * 3000, "(" * 3000,
    "$" + "{" * 3000 + "$", "\\frac" * 1000, "x" * 100_000, "a" * 40 + "b", "\x1b]0;x\x07", "\u202e1", "٣", "²",
    "NaN", "Infinity", "-" * 2000 + "1", "lambda: " * 500 + "1", "f\"{" * 200, "1" + "+1" * 20_000,
    "select " + "(" * 2000, "'\0'",
]  # fmt: skip
SCHEMA = json.dumps({
    "anyOf": [
        {"type": "number", "multipleOf": 0.01}, {"type": "integer", "multipleOf": 7},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "array", "items": {"$ref": "#"}}, {"type": "object", "additionalProperties": {"$ref": "#"}},
    ]
})  # fmt: skip
TERMS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "exact_match": ({"name": "exact_match"}, "Paris", "Paris"),
    "numeric": ({"name": "numeric"}, 7.5, "7.5"),
    "regex": ({"name": "regex", "pattern": "^(a+)+$|^7$", "timeout_s": 0.5}, None, "7"),
    "maths": ({"name": "maths", "timeout_s": 2.0}, "7.5", "7.5"),
    "json_schema": ({"name": "json_schema", "json_schema": "s.json", "timeout_s": 1.0}, None, '"aaa"'),
    "sql": ({"name": "sql", "database": "t.sql"}, "select 7", "select 7"),
    "python_tests": ({"name": "python_tests", "timeout_s": 1.0}, "assert f(1) == 7", "def f(x): return 7"),
    "length": ({"name": "length", "max": 3, "min": 3}, None, "aaa"),
    "format": ({"name": "format", "tags": ["a"]}, None, "<a>7</a>"),
}


@pytest.mark.parametrize("name", TERMS)
def test_odd_completions_stop_nobody(name: str, scores: Scorer) -> None:
    described, answer, right = TERMS[name]
    odd = ODD if name != "length" else [text for text in ODD if len(text) != 3]
    found = scores(described, *((text, answer) for text in [*odd, right]), s_json=SCHEMA, t_sql="create table t (a)")
    assert found[-1].value == 1.0
    assert [score.value for score in found[:-1]] == [0.0] * len(odd)


FRAME = """
import json, os, struct
def frame(message):
    content = message if isinstance(message, bytes) else json.dumps(message).encode()
    for fd in range(3, 64):
        try: os.write(fd, struct.pack("!I", len(content)) + content)
        except OSError: pass
"""
HELLO = """
frame({"functions": ["f"], "values": {}})
"""
SCHEMA_OF = {name: json.dumps({"type": kind, **more}) for name, kind, more in (
    ("multiple", "number", {"multipleOf": 0.01}), ("pattern", "string", {"pattern": "^(a+)+$"}), ("array", "array", {}),
)}  # fmt: skip


def schema(name: str) -> dict[str, Any]:
    return {"name": "json_schema", "json_schema": f"{name}.json", "timeout_s": 0.5}


TESTS: dict[str, Any] = {"name": "python_tests", "timeout_s": 0.5}
UNREADABLE: list[tuple[dict[str, Any], str, Any, str]] = [
    ({"name": "regex", "pattern": "(a+)+$", "timeout_s": 0.3}, "a" * 60 + "b", None, r"it ran over its 0\.3 s"),
    (schema("multiple"), "1" * 401, None, "OverflowError"),
    (schema("multiple"), "1e400", None, "1e400 is no number of JSON that can be computed with"),
    (schema("multiple"), "1" * 5000, None, "ValueError: Exceeds the limit"),
    (schema("pattern"), f'"{"a" * 60}b"', None, r"it ran over its 0\.5 s"),
    (schema("array"), "[" * 3000, None, "RecursionError"),
    ({"name": "sql", "database": "t.sql"}, "select \ud800", "select 1", "UnicodeEncodeError"),
    ({"name": "sql", "database": "t.sql"}, "-- nothing", "select 1", "DataError: it is no query"),
    ({"name": "maths", "timeout_s": 1.0}, "$9^{9^{9^{9^{9}}}}$", "4", r"it ran over its 1 s"),
    (TESTS, "while True: pass", "assert f(1) == 2", "the program ended, or ran over its time, while it was loaded"),
    (TESTS, "raise KeyError", "assert f(1) == 2", "the program raised KeyError while it was loaded"),
    (TESTS, "import os\ndef f(x): os._exit(0)", "assert f(1) == 2", "the program ended, or ran over its time"),
    (TESTS, "def f(x): return 10 ** 15", "assert sum(range(f(1))) == 2", r"it ran over its 3\.5 s"),
    (TESTS, "def f(x): return 10 ** 15", "try:\n    sum(range(f(1)))\nfinally:\n    pass", r"it ran over its 3\.5 s"),
    (TESTS, FRAME + "frame({'functions': [], 'values': {'x': ['complex', [9 ** 999, 0]]}})", "assert x == 2", "ended"),
    (TESTS, FRAME + "frame({'functions': 7})", "assert f(1) == 2", "ended"),
    (TESTS, FRAME + "frame(b'[' * 100000)", "assert f(1) == 2", "ended"),
    (TESTS, FRAME + HELLO + "frame({'value': ['complex', [10 ** 400, 0]]})", "assert f(1) == 2", "ended"),
    (TESTS, FRAME + HELLO + "frame({'value': ['int', 7]})", "assert f(1) == 2", "ended"),
    (TESTS, FRAME + HELLO + "frame(b'{\"value\": ' + b'[' * 100000)", "assert f(1) == 2", "ended"),
]  # fmt: skip


@pytest.mark.parametrize(("described", "completion", "answer", "reason"), UNREADABLE)
def test_what_cannot_be_looked_at_scores_0_and_says_why(
    described: dict[str, Any], completion: str, answer: Any, reason: str, scores: Scorer
) -> None:
    files = {f"{name}_json": text for name, text in SCHEMA_OF.items()}
    (found,) = scores(described, (completion, answer), t_sql="create table t (a)", **files)
    assert found.value == 0.0
    assert list(found.reasons) == [described["name"]]
    assert re.search(reason, found.reasons[described["name"]])


def test_values_that_a_program_gives_and_a_test_wraps_may_be_too_deep(scores: Scorer) -> None:
    deep = "def f(x):\n    found = []\n    for _ in range(45): found = [found]\n    return found if x == 1 else 2"
    tests = "given = f(1)\nfor _ in range(9): given = [given]\nassert f(given) == 2"
    assert [score.value for score in scores(TESTS, (deep, tests), ("def f(x): return 2", tests))] == [0, 1]


FAULTS: list[tuple[dict[str, Any], Any, str, str]] = [
    ({"name": "numeric"}, "1e400", "5", "answer is '1e400'; numeric allows a number, .* of at most 1.8e308"),
    ({"name": "numeric"}, int("9" * 400), "5", "answer is 9+; numeric allows"),
    ({"name": "numeric"}, "none", "", "answer is 'none'; numeric allows"),
    ({"name": "maths"}, "", "4", "answer is ''; maths allows"),
    ({"name": "sql", "database": "t.sql"}, "-- nothing", "select 1", "the answer's query fails: it is no query"),
    ({"name": "sql", "database": "t.sql"}, "select \ud800", "select 1", "surrogates not allowed"),
    ({"name": "sql", "database": "t.sql"}, [[1, [2]]], "select 1", "the answer's query fails"),
    ({"name": "sql", "database": "broken.sql"}, [[1]], "select 1", "the database's script .* fails"),
    ({"name": "json_schema", "json_schema": "around.json"}, None, "{}", "the schema cannot be used: RecursionError"),
    ({"name": "json_schema", "json_schema": "far.json"}, None, '{"a": 1}', "the schema cannot be used"),
    ({"name": "json_schema", "json_schema": "bad.json"}, None, '{"a": "x"}', "the schema "),
    (TESTS, "assert (", "def f(x): return 2", "the tests are no Python: SyntaxError"),
    (TESTS, "\0", "def f(x): return 2", "the tests are no Python"),
    (TESTS, "import nosuchmodule\nassert f(1) == 2", "def f(x): return 2", "No module named 'nosuchmodule'"),
    (TESTS, "try: f(lambda: 1)\nexcept BaseException: pass", "def f(x): return 2", "function is not plain data"),
    (TESTS, "while True: pass", "def f(x): return 2", "it ran over its 3.5 s"),
]  # fmt: skip


@pytest.mark.parametrize(("described", "answer", "completion", "said"), FAULTS)
def test_a_fault_of_the_task_is_an_error_whatever_the_completion_is(
    described: dict[str, Any], answer: Any, completion: str, said: str, scores: Scorer
) -> None:
    files = {
        "t_sql": "create table t (a)", "broken_sql": "create tab", "around_json": '{"$ref": "#"}',
        "far_json": '{"properties": {"a": {"$ref": "#/nowhere"}}}',
        "bad_json": '{"properties": {"a": {"pattern": "("}}}',
    }  # fmt: skip
    with pytest.raises(RewardFailed, match=f"rollout r0: .*{said}"):
        scores(described, (completion, answer), **files)
