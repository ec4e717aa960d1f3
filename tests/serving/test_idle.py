"""A process that is to end for idleness ends. How it serves until then: tests/local/test_on_demand.py."""

import signal
import subprocess
import sys

_STUCK = """
import time
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette

from knapper.serving import idle

idle._FIRST_S, idle._DRAIN_S = 0.1, 1

@asynccontextmanager
async def life(app):
    yield
    time.sleep(600)

uvicorn.run(idle.IdleTimeout(Starlette(lifespan=life), 0.1), port=0)
"""


def test_a_process_that_hangs_at_its_end_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", _STUCK], capture_output=True, text=True)
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert "scaled to zero" in done.stdout
