"""Runs the cookbook's own commands, one after another, in one process: its imports take longer than most loops do.

Each line of the standard input asks for one command, each line of the standard output answers. Started by
`workplace.py`, with the cookbook on PYTHONPATH and nothing of this repository.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import httpx


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        asked = json.loads(line)
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)  # not sys.stdout: loggers keep the stream that they began with
        os.dup2(output, 2)
        os.close(output)
        error = command(asked["target"], asked["arguments"], asked["document"])
        sys.stdout.flush()
        sys.stderr.flush()
        print(json.dumps({"error": error}), file=answers, flush=True)


def command(target: str, arguments: list[str], document: str | None) -> str | None:
    """Run a module, or the file of a script, as `python` would; the error that it ends with, if it does."""
    sys.argv = [target, *arguments]
    fetch = httpx.get
    if document is not None:  # the one thing that a script downloads

        def local(url: str, **_: Any) -> httpx.Response:
            return httpx.Response(200, text=Path(document).read_text("utf-8"), request=httpx.Request("GET", url))

        httpx.get = local  # type: ignore[assignment]  # of all its parameters a script passes the address
    try:
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return f"exit {ended.code}" if ended.code else None
    except Exception:  # noqa: BLE001  the border of the process: who asked gets it
        return traceback.format_exc()
    finally:
        httpx.get = fetch
    return None


main()
