"""The process that forks cells ends with its caller, whenever that goes, and without a word."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from knapper.sandbox import warden


def start(theirs: socket.socket) -> subprocess.Popen[str]:
    """A warden as the pool starts it."""
    config = {
        "path": [entry for entry in sys.path if entry.startswith("/")],
        "prefixes": sorted({sys.prefix, sys.base_prefix, sys.exec_prefix}), "imports": [], "parent": os.getpid(),
    }  # fmt: skip
    command = [sys.executable, "-s", "-S", "-P", os.fspath(warden.__file__), json.dumps(config)]
    with theirs:
        return subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("heard", [False, True], ids=["before its hello", "with its hello unread"])
def test_who_goes_while_the_warden_starts_leaves_no_traceback(heard: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        process = start(theirs)
        if heard:  # the hello is there, and is not read: its end comes as a reset connection, not as an end
            ours.recv(1, socket.MSG_PEEK)
            time.sleep(0.05)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (0, "")
