"""`knapper`, as somebody types it, each time in a process of its own: a fork of one that has imported what it needs.

A command takes hundredths of a second, and starting Python and importing what it needs most of one. What is imported
when, and what a command needs that is not installed, is for tests that start Python themselves.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

_IMPORTED = (
    "httpx", "knapper.chaos.report", "knapper.cli.main", "knapper.cli.jobs_client", "knapper.cli.jobs_rollouts",
    "knapper.cli.jobs_transfer", "knapper.cluster.doctor", "knapper.local.doctor", "knapper.local.supervisor",
    "knapper.state.gc.collector",
)  # fmt: skip
_turn = Lock()


def knapper(
    *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run it to its end. `environment`: all of it; our own, unless given."""
    with _turn, TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        asked = {
            "arguments": arguments,
            "environment": dict(os.environ if environment is None else environment),
            "cwd": str(cwd or Path.cwd()),
            "out": str(out),
            "err": str(err),
        }
        status = _ask(asked)
        return subprocess.CompletedProcess(["knapper", *arguments], status, *(_text(path) for path in (out, err)))


def _ask(asked: Mapping[str, object]) -> int:
    template = _template()
    assert template.stdin is not None
    assert template.stdout is not None
    try:
        template.stdin.write(json.dumps(asked) + "\n")
        template.stdin.flush()
        answer = template.stdout.readline()
    except BaseException:  # the test's time is over: what runs goes with it, and the next command has another template
        _end()
        raise
    assert answer, f"the template of commands ended: {template.wait()}"
    return int(answer)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _template() -> "subprocess.Popen[str]":
    atexit.register(_end)
    command = [sys.executable, "-m", "tests.command"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        start_new_session=True,
    )  # fmt: skip


def _end() -> None:
    if _template.cache_info().currsize == 0:
        return
    template = _template()
    for pipe in (template.stdin, template.stdout):
        assert pipe is not None
        pipe.close()
    os.killpg(template.pid, signal.SIGKILL)  # a command that runs too
    template.wait()
    _template.cache_clear()


def _serve() -> None:
    """A command a line in, its exit status out."""
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.freeze()
    requests, answers = (os.fdopen(os.dup(number), mode, encoding="utf-8") for number, mode in ((0, "r"), (1, "w")))
    for line in requests:
        if not (pid := os.fork()):
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _become(arguments: list[str], environment: dict[str, str], cwd: str, out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(path, flags | (os.O_CREAT if number else 0))
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["knapper", *arguments]
    runpy.run_module("knapper", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
