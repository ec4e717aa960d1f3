"""A rollout that exhausts a resource ends with an error; one that forges its result gains nothing."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from knapper.rewards import scorer, spec
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.scorer import RewardFailed
from knapper.sandbox.pool import Sandbox


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def sandbox(runner: asyncio.Runner) -> Iterator[Sandbox]:
    sandbox = Sandbox(at_once=2)
    yield sandbox
    runner.run(sandbox.close())


class Judge:
    def __init__(self, runner: asyncio.Runner, sandbox: Sandbox) -> None:
        self._runner, self._sandbox = runner, sandbox

    def code(self, body: str, timeout_s: float = 5.0, completion: str = "") -> float:
        """The value of `def reward(...)` with this body."""
        lines = ["def reward(prompt, completion, answer):", *(f"    {line}" for line in body.splitlines())]
        wanted = spec.parse({"code": "reward.py", "timeout_s": timeout_s}, {"reward.py": "\n".join(lines).encode()})
        return self._score(wanted, completion, None)

    def tests(self, program: str, tests: object, **options: object) -> float:
        return self._score(spec.parse({"name": "python_tests", **options}, {}), program, tests)

    def sql(self, query: str, answer: object, **options: object) -> float:
        script = b"create table t (a, b); insert into t values (1, 'x'), (2, 'y')"
        wanted = spec.parse({"name": "sql", "database": "tables.sql", **options}, {"tables.sql": script})
        return self._score(wanted, query, answer)

    def _score(self, wanted: spec.Reward, completion: str, answer: object) -> float:
        rollouts = [ScorableRollout("r", "", completion, answer)]
        return self._runner.run(scorer.score(wanted, rollouts, sandbox=self._sandbox))[0].value


@pytest.fixture
def judge(runner: asyncio.Runner, sandbox: Sandbox) -> Iterator[Judge]:
    """Whatever a test did, the next reward is scored as ever."""
    judge = Judge(runner, sandbox)
    yield judge
    assert judge.code("return 0.5") == 0.5


ENDLESS = {
    "a loop": "while True: pass",
    "a loop that swallows everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    ),
    "one long computation": "return (9 ** 9 ** 9) % 7",
    "a pattern": "import re\nreturn re.match('(a+)+$', 'a' * 60 + 'b') is None",
    "sleep": "import time\ntime.sleep(1000)",
    "sleep that no signal ends": (
        "import signal, time\nfor number in range(1, 32):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1000)"
    ),
    "a wait for its own pipe": "import os\nos.closerange(0, 3)\nimport select\nselect.select([], [], [])",
    "a number that never is one": ("class Never:\n    def __float__(self):\n        while True: pass\nreturn Never()"),
    "an error that cannot be printed": (
        "class Never(Exception):\n    def __str__(self):\n        while True: pass\nraise Never"
    ),
    "leaving its pipe and going on": "import os\nos.closerange(3, 64)\nwhile True: pass",
}


@pytest.mark.parametrize("body", ENDLESS.values(), ids=ENDLESS.keys())
def test_what_does_not_end_is_ended(body: str, judge: Judge) -> None:
    started = time.monotonic()
    with pytest.raises(RewardFailed, match=r"rollout r: it (ran over its 0\.3 s|was killed)"):
        judge.code(body, timeout_s=0.3)
    assert time.monotonic() - started < 5


GREEDY = {
    "a large object": "return len(bytearray(10 ** 11))",
    "many objects": "kept = []\nwhile True: kept.append(bytearray(10 ** 6))",
    "a long text": "return len('x' * (10 ** 11))",
    "a zip bomb": (
        "import zlib\nbomb = zlib.compress(bytes(10 ** 7))\nkept = [zlib.decompress(bomb) for _ in range(1000)]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", GREEDY.values(), ids=GREEDY.keys())
def test_memory_is_limited(body: str, judge: Judge) -> None:
    with pytest.raises(RewardFailed, match=r"MemoryError.*memory is used up"):
        judge.code(body, timeout_s=60.0)  # on a busy machine it takes seconds to fill the memory


CRASHING = {
    "the end of the process": ("import os\nos._exit(0)", "it ended without a result"),
    "the end with a code": ("import os\nos._exit(3)", "it ended with exit code 3"),
    "SystemExit": ("raise SystemExit(0)", "SystemExit"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "endless recursion": ("def f(): return f()\nreturn f()", "RecursionError"),
    "a null pointer": ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
    "abort": ("import os\nos.abort()", "killed by|exit code"),
}


@pytest.mark.parametrize(("body", "reason"), CRASHING.values(), ids=CRASHING.keys())
def test_a_crash_is_an_error_of_its_rollout(body: str, reason: str, judge: Judge) -> None:
    with pytest.raises(RewardFailed, match=reason):
        judge.code(body)


def test_giant_output_goes_nowhere(judge: Judge, capfd: pytest.CaptureFixture[str]) -> None:
    body = "import os, sys\nfor _ in range(200):\n    print('x' * 10 ** 6)\n    print('x' * 10 ** 6, file=sys.stderr)\n"
    body += "try: os.write(1, b'x' * 10 ** 6)\nexcept OSError: pass\nreturn 1"
    assert judge.code(body) == 1.0
    assert "xxx" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        ("os.write(fd, b'x' * 10 ** 6)", "wrote more into its result channel|something else than a result"),
        ("os.write(fd, b'not json')", "something else than a result"),
        ("os.write(fd, b'[1, 2]'); os._exit(0)", "something else than a result"),
        ('os.write(fd, b\'{"value": "1"}\'); os._exit(0)', "something else than a number"),
        ("os.write(fd, b'{\"value\": NaN}'); os._exit(0)", "it wrote nan into its result channel"),
        ("os.write(fd, b'{\"value\": 1' + b'0' * 400 + b'}'); os._exit(0)", "it wrote inf into its result channel"),
        ("os.write(fd, b'[' * 60000); os._exit(0)", "something else than a result"),
        ("os.close(fd)", "without a result|Bad file descriptor"),
    ],
)
def test_what_it_writes_into_its_result_channel_is_no_result(write: str, reason: str, judge: Judge) -> None:
    with pytest.raises(RewardFailed, match=reason):
        judge.code(f"import os\nfor fd in range(3, 64):\n    try: {write}\n    except OSError: pass\nreturn 1")


def test_rollouts_share_nothing(judge: Judge) -> None:
    leave = (
        "import sys, json\nfound = hasattr(sys, 'left') or hasattr(json, 'left')\n"
        "sys.left = json.left = 1\nreturn found"
    )
    assert [judge.code(leave) for _ in range(4)] == [0.0] * 4


def test_no_environment_comes_in(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNAPPER_CANARY", "sings")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sings")
    assert judge.code("import os\nreturn 'sings' in os.environ.values()") == 0.0
    assert judge.code("import ctypes\nreturn ctypes.CDLL(None).getenv(b'KNAPPER_CANARY') != 0") == 0.0


# Programs that are tested: what passes must be right.

CHEATS = {
    "equal to everything": (
        "class Any:\n    __eq__ = lambda self, other: True\n    __hash__ = None\ndef f(x): return Any()"
    ),
    "a number that lies": "class Any(int):\n    __eq__ = lambda self, other: True\ndef f(x): return Any(0)",
    "leaves with success": "import os\ndef f(x): os._exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "replaces Python's own": (
        "def abs(x): return 0\ndef all(x): return True\ndef print(*x): pass\ndef f(x): return 1000"
    ),
    "replaces them for everybody": (
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = int\ndef f(x): return 1000"
    ),
    "replaces what decides": (
        "import json, sys\nfor module in list(sys.modules.values()):\n    for name in ('tests', 'score', 'number'):\n"
        "        if hasattr(module, name): setattr(module, name, lambda *a: {'value': 1.0})\ndef f(x): return 1000"
    ),
    "writes a result everywhere": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"value\": 1.0}')\n    except OSError: pass\n"
        "def f(x): return 1000"
    ),
    "reads the tests": (
        "import gc, re\ndef f(x):\n    texts = [o for o in gc.get_objects() if isinstance(o, dict)]\n"
        "    found = [re.search(r'== (\\d+)', v) for d in texts for v in d.values() if isinstance(v, str)]\n"
        "    return next((int(m[1]) for m in found if m), 1000)"
    ),
    "never answers": "def f(x):\n    while True: pass",
    "never loads": "while True: pass",
    "answers too much": "def f(x): return 'x' * 10 ** 8",
    "is no Python": "def f(:",
    "has another name": "def g(x): return 2",
    "nests without end": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "bombs": "import os\nwhile True: os.fork()",
}  # fmt: skip


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS.keys())
def test_a_program_cannot_forge_its_score(program: str, judge: Judge) -> None:
    tests = "assert abs(f(1) - 2) == 0\nassert all([f(3) == 4])"
    assert judge.tests("def f(x): return x + 1", tests) == 1
    assert judge.tests(program, tests, timeout_s=0.5) == 0


def test_in_one_process_the_tests_could_be_read() -> None:
    """The cheat above works where the program and its tests share memory."""
    program = f"{CHEATS['reads the tests']}\nscope = {{'test': 'assert f(1) == 2', 'f': f}}\nassert f(1) == 2"
    subprocess.run([sys.executable, "-I", "-c", program], check=True)


QUERIES = {
    "attaches a file": "attach database '/tmp/knapper-attached' as other",
    "turns pragmas": "pragma writable_schema = 1",
    "loads a library": "select load_extension('libc.so.6')",
    "writes": "delete from t returning a",
    "never ends": "with recursive c(n) as (select 1 union all select n + 1 from c) select count(*) from c",
    "takes memory": "select length(randomblob(1000000000))",
    "gives too many rows": (
        "with recursive c(n) as (select 1 union all select n + 1 from c limit 100000) select n from c"
    ),
    "are two": "select a from t; drop table t",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_a_query_only_reads(query: str, judge: Judge) -> None:
    assert judge.sql("select a from t order by b desc", "select a from t") == 1
    assert judge.sql(query, "select a from t", timeout_s=1.0) == 0
    assert not Path("/tmp/knapper-attached").exists()


def _code(body: bytes) -> spec.Reward:
    return spec.parse({"code": "reward.py"}, {"reward.py": b"def reward(p, c, a): " + body})


def alive(pid: object) -> bool:
    """And no zombie, which only waits for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_cancelled_score_leaves_no_process(runner: asyncio.Runner) -> None:
    async def story() -> None:
        sandbox = Sandbox(at_once=1)
        rollouts = [ScorableRollout("r", "", "", None)]
        await scorer.score(_code(b"return 1"), rollouts, sandbox=sandbox)  # its process has started
        scoring_ = asyncio.create_task(scorer.score(_code(b"\n    while True: pass"), rollouts, sandbox=sandbox))
        await asyncio.sleep(0.3)
        (pid,) = sandbox.pids
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # noqa: ASYNC240  not a disk
        assert children

        def living() -> list[object]:
            return [process for process in (pid, *children) if alive(process)]

        assert len(living()) == 2
        scoring_.cancel()
        await asyncio.wait([scoring_])
        for _ in range(100):
            if not living():
                break
            await asyncio.sleep(0.02)
        assert not living()
        await sandbox.close()

    runner.run(story())
