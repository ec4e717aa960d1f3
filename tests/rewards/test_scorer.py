"""What each reward gives, through the sandbox where it needs one."""

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from knapper import limits
from knapper.errors import UserError
from knapper.rewards import requests
from knapper.rewards.scorer import RewardFailed, RewardScore
from knapper.sandbox.pool import Sandbox
from tests.rewards.conftest import Scorer


def values(scored: list[RewardScore]) -> list[float]:
    return [score.value for score in scored]


# name, options, completion, answer, value
CASES: list[tuple[str, dict[str, Any], str, Any, float]] = [
    ("exact_match", {}, " Paris\n", "Paris", 1),
    ("exact_match", {}, "Paris.", "Paris", 0),
    ("exact_match", {}, "", "Paris", 0),
    ("exact_match", {}, "42", 42, 1),
    ("exact_match", {"ignore_case": True}, "PARIS", "paris", 1),
    ("exact_match", {"take": "last_line"}, "I think.\nParis\n", "Paris", 1),
    ("exact_match", {"between": ["<a>", "</a>"]}, "<a>Rome</a> no <a>Paris</a>", "Paris", 1),
    ("exact_match", {"between": ["<a>", "</a>"]}, "<a>Paris", "Paris", 0),
    ("exact_match", {"between": ["####", ""]}, "so it is #### 7", 7, 1),
    ("exact_match", {"take": "code_block"}, "```text\nParis\n```", "Paris", 1),
    ("exact_match", {"take": "code_block"}, "a ```x``` b ```\nParis", "Paris", 1),
    ("numeric", {}, "It costs 1,234.50 dollars", 1234.5, 1),
    ("numeric", {}, "first 3, then -4.", "-4", 1),
    ("numeric", {}, "1e3", 1000, 1),
    ("numeric", {}, "9" * 5000, 1, 0),
    ("numeric", {}, "none", 1, 0),
    ("numeric", {"absolute": 0.5}, "2.4", 2, 1),
    ("numeric", {"absolute": 0.5}, "2.6", 2, 0),
    ("regex", {"pattern": "^[ab]+$"}, "abba", None, 1),
    ("regex", {"pattern": "bb"}, "abba", None, 1),
    ("regex", {"pattern": "bb", "whole": True}, "abba", None, 0),
    ("maths", {}, "so the answer is \\boxed{\\frac{1}{2}}", "0.5", 1),
    ("maths", {}, "\\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
    ("maths", {}, "$x = 3$", 3, 1),
    ("maths", {}, "$\\{1, 2\\}$", "$\\{2, 1\\}$", 1),
    ("maths", {}, "5", "4", 0),
    ("maths", {}, "I do not know", "4", 0),
    ("maths", {"timeout_s": 2.0}, "$9^{9^{9^{9^{9}}}}$", "4", 0),
    ("length", {"max": 5}, "12345", None, 1),
    ("length", {"max": 5}, "123456", None, 0),
    ("length", {"max": 5, "slope": 4}, "123456", None, 0.75),
    ("length", {"max": 5, "min": 2, "unit": "words"}, "one", None, 0),
    ("format", {"tags": ["think", "answer"]}, "<think>a</think>\n<answer>b</answer>\n", None, 1),
    ("format", {"tags": ["think", "answer"]}, "<answer>b</answer><think>a</think>", None, 0),
    ("format", {"tags": ["think"]}, "<think>a</think> and more", None, 0),
    ("format", {"tags": ["think"]}, "<think><think>a</think>", None, 0),
    ("python_tests", {}, "Here:\n```python\ndef f(x): return x + 1\n```", "assert f(1) == 2", 1),
    ("python_tests", {}, "import math\ndef f(x): return math.sqrt(x)", ["assert f(4) == 2", "assert f(9) == 4"], 0),
    ("python_tests", {"partial": True}, "def f(x): return 2", ["assert f(4) == 2", "assert f(9) == 3"], 0.5),
    ("python_tests", {}, "def f(x): raise KeyError(x)", "try: f(1)\nexcept KeyError: pass\nelse: assert False", 1),
    ("python_tests", {}, "def f(**k): return {**k, 'b': ({1}, b'x', 1j, None, -2**70)}",
     "assert f(a=[1.5]) == {'a': [1.5], 'b': ({1}, b'x', 1j, None, -2**70)}", 1),
    ("python_tests", {}, "LIMIT = 3", "assert LIMIT == 3", 1),
    ("python_tests", {"functions": ["sum"]}, "def sum(a, b): return a + b", "assert sum(1, 2) == 3", 1),
    ("python_tests", {}, "def add(a, b): return a + b", "def check(f):\n    assert f(1, 2) == 3\ncheck(add)", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "completion", "answer", "value"), CASES)
def test_named_rewards(
    name: str, options: dict[str, Any], completion: str, answer: Any, value: float, scores: Scorer
) -> None:
    assert values(scores({"name": name, **options}, (completion, answer))) == [value]


SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'


def test_a_json_schema(scores: Scorer) -> None:
    described = {"name": "json_schema", "json_schema": "s.json", "take": "code_block"}
    given = ['{"n": 1}', '```json\n{"n": 1}\n```', '{"n": "1"}', "{}", "no", "[" * 100_000, '{"n": NaN}', ""]
    assert values(scores(described, *((text, None) for text in given), s_json=SCHEMA)) == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("schema", ['{"type": "objekt"}', '{"$ref": "http://127.0.0.1:9/schema.json"}'])
def test_a_schema_that_is_none_is_said(schema: str, scores: Scorer) -> None:
    with pytest.raises(RewardFailed, match="rollout r0: the schema"):
        scores({"name": "json_schema", "json_schema": "s.json"}, ("{}", None), s_json=schema)


TABLES = "create table t (a integer, b real); insert into t values (1, 0.1), (2, 0.2), (2, 0.3);"


@pytest.mark.parametrize(
    ("query", "answer", "ordered", "value"),
    [
        ("select a from t order by a desc", "select a from t", False, 1),
        ("select a from t order by a desc", "select a from t order by a", True, 0),
        ("select distinct a from t", "select a from t", False, 0),
        ("select sum(b) from t", [[0.6]], False, 1),
        ("select nothing from t", [[1]], False, 0),
        ("", "select a from t", False, 0),
    ],
)
def test_sql_is_equal_if_its_rows_are(query: str, answer: Any, ordered: bool, value: float, scores: Scorer) -> None:
    described = {"name": "sql", "database": "t.sql", "ordered": ordered}
    assert values(scores(described, (query, answer), t_sql=TABLES)) == [value]


@pytest.mark.parametrize(
    ("described", "answer", "said"),
    [
        ({"name": "exact_match"}, None, "answer is None; exact_match allows a text or a number"),
        ({"name": "numeric"}, "many", "answer is 'many'; numeric allows a number"),
        ({"name": "maths"}, [1], r"answer is \[1\]; maths allows a text or a number"),
        ({"name": "python_tests"}, [], r"answer is \[\]; python_tests allows"),
        ({"name": "python_tests"}, "assert (", "the tests are no Python: SyntaxError"),
        ({"name": "python_tests"}, "f(lambda: 1)", "f.*function is not plain data; tests may pass.*line 1"),
        ({"name": "python_tests", "timeout_s": 0.2}, "while True: pass", "it ran over its 3.2 s"),
        ({"name": "sql", "database": "t.sql"}, "select missing", "the answer's query fails: no such column"),
    ],
)
def test_a_reward_at_fault_is_an_error_and_no_zero(
    described: dict[str, Any], answer: Any, said: str, scores: Scorer
) -> None:
    with pytest.raises(RewardFailed, match=f"rollout r0: .*{said}"):
        scores(described, (f"def f(x): return 1 # {'a' * 60}b", answer), t_sql=TABLES)


CODE = """
import json
CALLS = []

def reward(prompt, completion, answer):
    CALLS.append(1)
    return json.loads(completion)["n"] / answer + len(CALLS) - 1
"""


def test_code_of_the_user(scores: Scorer) -> None:
    assert values(scores({"code": "r.py"}, ('{"n": 1}', 2), ('{"n": 3}', 2), r_py=CODE)) == [0.5, 1.5]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (CODE, r"JSONDecodeError: Expecting value: .* \(r.py, line 7: return json.loads\(completion\)\[\"n\"\]"),
        ("def reward(p, c, a):\n    return float('nan')", "r.py returned nan; allowed: a finite number"),
        ("def reward(p, c, a):\n    return float('-inf')", "r.py returned -inf; allowed: a finite number"),
        ("def reward(p, c, a):\n    return None", "r.py returned NoneType; allowed: a finite number"),
        ("def reward(p, c, a):\n    return '1.0'", "r.py returned str; allowed: a finite number"),
        ("def reward(p, c):\n    return 1", "TypeError: reward.. takes 2 positional arguments"),
        ("def rewards(p, c, a):\n    return 1", "r.py has no function `reward"),
        ("def reward(:", "SyntaxError.*r.py, line 1"),
        ("import nosuchthing\ndef reward(p, c, a): return 1", "No module named 'nosuchthing'.*line 1: import nosuch"),
        ("def reward(p, c, a):\n    open('/etc/passwd')", "has no files.*r.py, line 2: open"),
        ("def reward(p, c, a):\n    raise ValueError('x' * 10000)", "ValueError: xxx.*line 2"),
    ],
)
def test_what_goes_wrong_in_code_is_said_with_its_line(code: str, said: str, scores: Scorer) -> None:
    with pytest.raises(RewardFailed, match=f"rollout r0: .*{said}") as error:
        scores({"code": "r.py"}, ("not json", 2), r_py=code)
    assert len(error.value.reason) <= limits.reward_reason_chars_max
    assert error.value.rollout_id == "r0"


def test_the_rollout_that_fails_is_named(scores: Scorer) -> None:
    with pytest.raises(RewardFailed, match="rollout r2: "):
        scores({"code": "r.py"}, ('{"n": 1}', 2), ('{"n": 1}', 2), ("", 2), r_py=CODE)


def test_randomness_is_the_same_for_the_same_rollout(scores: Scorer) -> None:
    code = "import random\ndef reward(p, c, a):\n    return random.random() + hash('x') % 1000"
    first, again = (values(scores({"code": "r.py"}, ("a", 0), ("b", 0), r_py=code)) for _ in range(2))
    assert first == again
    assert first[0] != first[1]


def test_a_weighted_sum_keeps_its_parts(scores: Scorer) -> None:
    described = [
        {"name": "exact_match", "weight": 2.0},
        {"name": "length", "max": 3, "weight": -0.5, "label": "short"},
        {"code": "r.py"},
    ]
    (scored,) = scores(described, ("yes", "yes"), r_py="def reward(p, c, a): return len(p) / 10")
    assert scored == RewardScore(2.0 - 0.5 + 1.0, {"exact_match": 1.0, "short": 1.0, "code": 1.0})


def test_a_sum_that_overflows_is_an_error(scores: Scorer) -> None:
    with pytest.raises(RewardFailed, match="the weighted sum is inf"):
        scores({"code": "r.py", "weight": 1e300}, ("", 0), r_py="def reward(p, c, a): return 1e300")


def test_sixty_four_rollouts_take_less_than_two_seconds(scores: Scorer) -> None:
    code = "def reward(p, c, a): return int(c)"
    scores({"code": "r.py"}, ("1", 0), r_py=code)
    started = time.monotonic()
    assert values(scores({"code": "r.py"}, *((str(n), 0) for n in range(64)), r_py=code)) == list(range(64))
    assert time.monotonic() - started < 2.0


def test_texts_have_a_limit(scores: Scorer) -> None:
    most = limits.reward_text_chars_max
    full = "x" * most
    assert values(scores({"name": "length", "max": 0}, (full, None))) == [0]
    with pytest.raises(RewardFailed, match=f"the completion: {most + 1} characters; allowed: at most {most}"):
        scores({"name": "length", "max": 0}, (full + "x", None))
    around = len('["the prompt",""]')
    assert values(scores({"name": "length", "max": 0}, ("", full[around:]))) == [1]
    with pytest.raises(
        RewardFailed, match=f"prompt and answer as JSON: {most + 1} characters; allowed: at most {most}"
    ):
        scores({"name": "length", "max": 0}, ("", full[around - 1 :]))


WITHOUT_SECCOMP = """
import asyncio, ctypes, errno, struct, sys
from knapper.rewards import scorer, spec
from knapper.rewards.rollouts import ScorableRollout
from knapper.sandbox import seccomp
from knapper.sandbox.pool import SandboxMissing
from knapper.sandbox.syscalls import NUMBERS

column, _ = seccomp._ARCHITECTURES[__import__("os").uname().machine]
steps = [(0x20, 0, 0, 0), (0x15, 0, 3, NUMBERS["prctl"][column]), (0x20, 0, 0, 16), (0x15, 0, 1, 22),
         (0x06, 0, 0, 0x50000 | errno.EINVAL), (0x06, 0, 0, 0x7FFF0000)]  # every prctl(PR_SET_SECCOMP) is EINVAL
code = b"".join(struct.pack("=HBBI", *step) for step in steps)
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(seccomp._Program(len(steps), code)), 0, 0) == 0

def score(described, **files):
    reward = spec.parse(described, files)
    return asyncio.run(scorer.score(reward, [ScorableRollout("r", "", "a", "assert True")]))[0].value

assert score({"name": "regex", "pattern": "a"}) == 1.0
for described in ({"code": "code"}, {"name": "python_tests"}, {"name": "maths"}, {"name": "sql", "database": "code"}):
    try:
        score(described, code=b"def reward(p, c, a): return 1")
    except SandboxMissing as error:
        print(error)
"""


def test_a_machine_without_seccomp_runs_no_code_and_says_why() -> None:
    """A real kernel that refuses filters: by a filter. Rewards that are no code work all the same."""
    command = [sys.executable, "-c", WITHOUT_SECCOMP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refusals = [line for line in done.stdout.splitlines() if "debug" not in line]
    assert len(refusals) == 4, done.stdout
    for line in refusals:
        assert "the kernel refuses seccomp filters (Invalid argument); allowed: Linux on x86_64 or aarch64" in line


def test_a_seal_that_holds_nothing_is_noticed() -> None:
    """A warden whose filters let everything pass finds out by trying, and refuses."""
    loose = "from knapper.sandbox import seccomp; seccomp.install = lambda stage: None; "
    proof = "from knapper.sandbox import cell, warden; cell.load(cell.COMMON); print(warden.proof())"
    command = [sys.executable, "-c", loose + proof]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "a sealed process could: open a socket\n", done.stderr


def request(**changes: Any) -> bytes:
    rollouts = [{"id": "a", "prompt": [{"role": "user", "content": "?"}], "completion": "1", "answer": 1}]
    return json.dumps({"reward": {"name": "numeric"}, "rollouts": rollouts, **changes}).encode()


def test_a_request_is_answered_in_its_order(runner: asyncio.Runner, sandbox: Sandbox) -> None:
    rollouts = [{"id": name, "completion": text, "answer": 7} for name, text in (("b", "7"), ("a", "8"))]
    answer = json.loads(runner.run(requests.answer(request(rollouts=rollouts), sandbox)))
    assert answer == {
        "scores": [
            {"id": "b", "value": 1.0, "parts": {"numeric": 1.0}},
            {"id": "a", "value": 0.0, "parts": {"numeric": 0.0}},
        ]
    }


def test_code_sees_the_prompt_as_it_was_sent(runner: asyncio.Runner, sandbox: Sandbox) -> None:
    code = "def reward(prompt, completion, answer): return prompt == [{'role': 'user', 'content': '?'}]"
    answer = runner.run(requests.answer(request(reward={"code": "r.py"}, files={"r.py": code}), sandbox))
    assert json.loads(answer)["scores"][0]["value"] == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollouts": [{"id": "a", "completion": 1}]}, r"rollouts\[0\].completion is 1; allowed: str"),
        ({"rollouts": [{"id": "", "completion": ""}]}, r"rollouts\[0\].id is ''"),
        ({"rollouts": [{"id": "a", "completion": ""}] * 2}, r"rollouts\[\].id is 'a'; allowed: an id that no other"),
        ({"rollouts": [{"id": f"{n}", "completion": ""} for n in range(1025)]}, "has 1025 rollouts; allowed: 1024"),
        ({"reward": {"name": "x"}}, "reward.name is 'x'"),
        ({"rewards": 1}, "rewards is 1; allowed: no field of this name, only reward, files, rollouts"),
    ],
)
def test_a_wrong_request_is_refused(changes: Any, said: str, runner: asyncio.Runner, sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match=said):
        runner.run(requests.answer(request(**changes), sandbox))


def test_the_most_rollouts_are_allowed(runner: asyncio.Runner, sandbox: Sandbox) -> None:
    rollouts = [{"id": f"{n}", "completion": "", "answer": 1} for n in range(limits.rollouts_per_request_max)]
    answer = json.loads(runner.run(requests.answer(request(rollouts=rollouts), sandbox)))
    assert len(answer["scores"]) == limits.rollouts_per_request_max
