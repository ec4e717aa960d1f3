"""What a reward.py imports may exit, hang or fork: it is an error of that reward, and nobody else notices."""

from pathlib import Path

import pytest

from knapper import limits
from knapper.rewards.scorer import RewardFailed
from tests.rewards.conftest import Scorer

MODULES = {
    "exits": ("raise SystemExit(0)", "r.py: loading what it imports: it failed: .*importing exits raised SystemExit"),
    "interrupts": ("raise KeyboardInterrupt", "importing interrupts raised KeyboardInterrupt"),
    "leaves": ("import os\nos._exit(0)", "loading what it imports: it ended without a result"),
    "leaves_with_a_code": ("import os\nos._exit(3)", "loading what it imports: it ended with exit code 3"),
    "dies": ("import os, signal\nos.abort()", "loading what it imports: it (was killed|ended)"),
    "hangs": ("while True: pass", "loading what it imports: it ran over its 1 s"),
    "sleeps": ("import time\ntime.sleep(1000)", "loading what it imports: it ran over its 1 s"),
    "forks": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "it ran over its 1 s"),
    "raises": ("raise ValueError('\\x1b[31m')", "r.py, line 1: import raises"),
}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (text, _) in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(limits, "reward_loading_s", 1.0)


@pytest.mark.parametrize("name", MODULES)
def test_an_import_that_ends_the_program_is_an_error_of_the_reward(name: str, scores: Scorer) -> None:
    code = f"import {name}\ndef reward(p, c, a): return 1.0"
    for _ in range(2):  # and again: nothing was remembered of it
        with pytest.raises(RewardFailed, match=f"rollout r0: .*{MODULES[name][1]}"):
            scores({"code": "r.py"}, ("", None), r_py=code)
    assert scores({"code": "r.py"}, ("", None), r_py="def reward(p, c, a): return 0.5")[0].value == 0.5


@pytest.mark.parametrize("name", ["exits", "leaves", "interrupts", "raises"])
def test_a_program_that_imports_it_scores_0_and_tests_that_do_are_at_fault(name: str, scores: Scorer) -> None:
    described = {"name": "python_tests", "timeout_s": 0.5}
    assert scores(described, (f"import {name}\ndef f(x): return 2", "assert f(1) == 2"))[0].value == 0
    with pytest.raises(RewardFailed, match=r"rollout r0: (it |ImportError|ModuleNotFound|Permission)"):
        scores(described, ("def f(x): return 2", f"import {name}\nassert f(1) == 2"))


def test_what_can_be_loaded_is_there(scores: Scorer) -> None:
    code = "import numpy\ntry: import nosuch\nexcept ImportError: pass"
    assert scores({"code": "r.py"}, ("", 2), r_py=f"{code}\ndef reward(p, c, a): return numpy.float64(a)")[0].value == 2
