"""Become a command that dies with its parent, in a group of its own: `python child.py PARENT_PID COMMAND...`.

Linux sends the signal when the parent's thread that forked ends, however it ends; so the supervisor forks from its main
thread. Elsewhere children outlive a supervisor that was killed with SIGKILL.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.setpgid(0, 0)  # Ctrl-C reaches the supervisor alone, which ends us; process_group.py then ends what we leave
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
