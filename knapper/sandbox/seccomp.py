"""Seccomp filters, built here and installed through prctl: no library, no privilege, the same under gVisor.

Not libseccomp: its Python binding needs a shared library that slim images have only by accident, and these few
instructions are all that is used of it.
"""

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Mapping
from functools import cache

from knapper.sandbox.syscalls import NUMBERS, STAGES, Rule, Stage

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of NUMBERS, AUDIT_ARCH_*

# <linux/bpf_common.h>
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
# <linux/seccomp.h>
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_libc = ctypes.CDLL(None, use_errno=True)

# <linux/prctl.h>
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def unsupported() -> str:
    """Why filters cannot be made here, or nothing."""
    machine = os.uname().machine
    if sys.platform != "linux":
        return f"seccomp is a part of Linux, and this is {sys.platform}"
    return "" if machine in _ARCHITECTURES else f"no list of system calls for {machine}; there are: x86_64, aarch64"


@cache
def compiled(stage: Stage, machine: str) -> bytes:
    """The filter as an array of struct sock_filter. Another architecture's calls end the process."""
    allowed: Mapping[str, Rule] = STAGES[stage]
    column, architecture = _ARCHITECTURES[machine]
    program = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_EQUAL, architecture, yes=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    for name, rule in allowed.items():
        if (number := NUMBERS[name][column]) is None:
            continue
        if rule is None:
            program += [_instruction(_EQUAL, number, no=1), _instruction(_RETURN, _ALLOW)]
        else:
            program += [
                _instruction(_EQUAL, number, no=4),
                _instruction(_LOAD, _ARGUMENTS_AT + 8 * rule.argument),  # the lower half: these arguments are ints
                _instruction(_ANY_BIT, rule.bits, no=1),
                _instruction(_RETURN, _ERRNO | errno.EPERM),
                _instruction(_RETURN, _ALLOW),
            ]
    # Its arguments lie in memory, which a filter cannot read; told that it does not exist, glibc uses clone.
    program += [
        _instruction(_EQUAL, NUMBERS["clone3"][column] or 0, no=1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    return b"".join([*program, _instruction(_RETURN, _ERRNO | errno.EPERM)])


def install(stage: Stage) -> None:
    """For this process and all that it forks, for ever. Raises OSError where the kernel refuses."""
    code = compiled(stage, os.uname().machine)
    program = _Program(len(code) // 8, code)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if _libc.prctl(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, f"the kernel refuses seccomp filters ({os.strerror(number)})")


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """struct sock_filter; `yes`, `no`: how many instructions a comparison skips."""
    return struct.pack("=HBBI", code, yes, no, value)
