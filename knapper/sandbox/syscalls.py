"""Which system calls each stage of a cell may make: lists of what is allowed, all else fails with EPERM.

x86_64 and aarch64 as <asm/unistd.h> numbers them; None: the machine has no such call.
"""

from dataclasses import dataclass
from typing import Literal

_EXECUTABLE = 0x4  # PROT_EXEC
_WRITING = 0x1 | 0x2 | 0x40 | 0x200 | 0x400 | 0x400000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE's bit
# Every flag of clone that makes a thread or a namespace, as opposed to a plain fork.
_NOT_A_FORK = 0x00010000 | 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000


@dataclass(frozen=True)
class Unless:
    """Allowed, unless the argument has one of these bits."""

    argument: int
    bits: int


Rule = Unless | None

# Once somebody else's code runs: compute, tell the time, use the pipes that are open. No file and no socket can be
# opened, no process or thread begun; memory cannot be made executable; nothing outside can be signalled.
_SEALED: dict[str, Rule] = {
    "read": None, "write": None, "readv": None, "writev": None, "close": None, "lseek": None, "fstat": None,
    "brk": None, "mmap": Unless(2, _EXECUTABLE), "mprotect": Unless(2, _EXECUTABLE), "munmap": None, "mremap": None,
    "madvise": None, "futex": None,
    "rt_sigaction": None, "rt_sigprocmask": None, "rt_sigreturn": None, "sigaltstack": None,
    "setitimer": None, "getitimer": None, "alarm": None,
    "clock_gettime": None, "clock_getres": None, "clock_nanosleep": None, "nanosleep": None, "gettimeofday": None,
    "time": None, "times": None, "getrusage": None, "restart_syscall": None, "sched_yield": None,
    "poll": None, "ppoll": None, "select": None, "pselect6": None,
    "getpid": None, "gettid": None, "getppid": None, "getuid": None, "geteuid": None, "getgid": None, "getegid": None,
    "getrandom": None, "exit": None, "exit_group": None,
}  # fmt: skip

# For tasks of ours on somebody else's data: reading files too, as libraries do that load their parts late.
_READING: dict[str, Rule] = {
    **_SEALED,
    "open": Unless(1, _WRITING), "openat": Unless(2, _WRITING), "pread64": None, "mmap": None, "mprotect": None,
    "stat": None, "lstat": None, "newfstatat": None, "statx": None, "statfs": None, "fstatfs": None,
    "readlink": None, "readlinkat": None, "getdents64": None, "access": None, "faccessat": None, "faccessat2": None,
    "getcwd": None, "uname": None, "sysinfo": None, "sched_getaffinity": None,
}  # fmt: skip

# While a cell gets ready: what closes the doors behind it.
_LOADING: dict[str, Rule] = {
    **_READING,
    "fcntl": None, "prlimit64": None, "getrlimit": None, "setrlimit": None, "close_range": None, "prctl": None,
    "setresuid": None, "setresgid": None, "setgroups": None,
}  # fmt: skip

# The warden, which runs nobody's code but ours: forks cells, waits for them, ends them.
_WARDEN: dict[str, Rule] = {
    **_LOADING,
    "clone": Unless(0, _NOT_A_FORK), "fork": None, "wait4": None, "kill": None, "pipe2": None, "socketpair": None,
    "dup2": None, "dup3": None, "set_robust_list": None, "rseq": None, "set_tid_address": None,
}  # fmt: skip

Stage = Literal["warden", "loading", "reading", "sealed"]  # each allows a part of the one before
STAGES: dict[Stage, dict[str, Rule]] = {
    "warden": _WARDEN,
    "loading": _LOADING,
    "reading": _READING,
    "sealed": _SEALED,
}

# name: (x86_64, aarch64)
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "access": (21, None), "alarm": (37, None), "brk": (12, 214), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clone": (56, 220), "clone3": (435, 435),
    "close": (3, 57), "close_range": (436, 436), "dup2": (33, None), "dup3": (292, 24), "exit": (60, 93),
    "exit_group": (231, 94), "faccessat": (269, 48), "faccessat2": (439, 439), "fcntl": (72, 25), "fork": (57, None),
    "fstat": (5, 80), "fstatfs": (138, 44), "futex": (202, 98), "getcwd": (79, 17), "getdents64": (217, 61),
    "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176), "getitimer": (36, 102), "getpid": (39, 172),
    "getppid": (110, 173), "getrandom": (318, 278), "getrlimit": (97, 163), "getrusage": (98, 165),
    "gettid": (186, 178), "gettimeofday": (96, 169), "getuid": (102, 174), "kill": (62, 129), "lseek": (8, 62),
    "lstat": (6, None), "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216),
    "munmap": (11, 215), "nanosleep": (35, 101), "newfstatat": (262, 79), "open": (2, None), "openat": (257, 56),
    "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "prctl": (157, 167), "pread64": (17, 67),
    "prlimit64": (302, 261), "pselect6": (270, 72), "read": (0, 63), "readlink": (89, None), "readlinkat": (267, 78),
    "readv": (19, 65), "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "select": (23, None), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "setgroups": (116, 159),
    "setitimer": (38, 103), "setresgid": (119, 149), "setresuid": (117, 147), "setrlimit": (160, 164),
    "sigaltstack": (131, 132), "socketpair": (53, 199), "stat": (4, None), "statfs": (137, 43), "statx": (332, 291),
    "sysinfo": (99, 179), "time": (201, None), "times": (100, 153), "uname": (63, 160), "wait4": (61, 260),
    "write": (1, 64), "writev": (20, 66),
}  # fmt: skip
