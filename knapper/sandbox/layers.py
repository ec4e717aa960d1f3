"""The walls of a cell besides seccomp. Each says what it did; those that a machine lacks are named, not passed over."""

import ctypes
import os
import resource
import signal
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_NOBODY = 65534

# <linux/landlock.h>; the calls have one number on all architectures
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH = 1, 1
_READ = 0x4 | 0x8  # READ_FILE, READ_DIR
_ALL_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # by version; from 5 on also IOCTL_DEV
_ALL_NETWORK = 0x3  # from version 4: BIND_TCP, CONNECT_TCP


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def die_with_parent(parent: int) -> None:
    """SIGKILL when the parent's thread that forked us ends; and no core file, no tracing by others of our user."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def own_namespaces() -> str:
    """A network without interfaces and an own IPC room. Nothing, or why this machine gives none."""
    flags = _CLONE_NEWNET | _CLONE_NEWIPC | (_CLONE_NEWUSER if os.geteuid() else 0)
    return "" if _libc.unshare(flags) == 0 else os.strerror(ctypes.get_errno())


def read_only_below(directories: Iterable[str]) -> str:
    """By Landlock: files below these can be read, no other opened. Nothing, or why this machine cannot."""
    version = _libc.syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 1:
        return os.strerror(ctypes.get_errno())
    files = _ALL_FILES.get(version, 0xFFFF)
    ruleset = _Ruleset(files, _ALL_NETWORK if version >= 4 else 0)
    size = ctypes.sizeof(ruleset) if version >= 4 else 8
    rules = _libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if rules < 0:
        return os.strerror(ctypes.get_errno())
    for directory in directories:
        try:
            parent = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not every machine has each
        allowed = _READ if os.path.isdir(directory) else _READ & 0x4  # noqa: PTH112  loads before pathlib
        beneath = _Beneath(allowed, parent)
        _libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(beneath), 0)
        os.close(parent)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # without it only root may restrict itself
    failed = _libc.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)
    return os.strerror(ctypes.get_errno()) if failed else ""


def limit(cpu_s: int) -> None:
    """What no cell may pass. Memory comes later, by `limit_memory`: what is loaded does not count."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (most, most))


def limit_memory(more_bytes: int) -> None:
    """Of address space, beyond what the process has now."""
    with open("/proc/self/statm", encoding="ascii") as pages:  # noqa: PTH123  loads before pathlib
        now = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))


def drop_root() -> None:
    """Where a container runs as root: become nobody, without any capability."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
