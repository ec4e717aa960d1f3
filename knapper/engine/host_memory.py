"""Memory that this process can still take on the machine, by the kernel's account and by its control groups.

A container sees the whole machine in /proc/meminfo; its limit is its control group's, or that of a group above.
"""

import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_RECLAIMED: Final = (
    "inactive_file",
    "active_file",
)  # page cache, which the kernel reclaims before it kills a process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h's
_DEFAULT_TRIM_BYTES: Final = 128 << 10
_KEPT_BYTES: Final = 1 << 30  # a block of more is mapped for itself, and given back when it is freed


def available(root: Path = Path("/")) -> int:
    """Bytes, 0 at least. `root`: where proc and sys are."""
    return max(0, min([_kernel(root), *_groups(root), *_process_limit(root)]))


def _kernel(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux: free memory is unknown; half of all is mostly free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _process_limit(root: Path) -> Iterator[int]:
    """The remainder of the process's own limit (`ulimit -v`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and (pages := _read(root / "proc/self/statm")):
        yield limit - int(pages.split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[int]:
    """The remainder of each control group of the process and of each group above it. Versions 1 and 2 may coexist."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, group_path = line.split(":", 2)
        limits, used = ["memory.limit_in_bytes"], "memory.usage_in_bytes"
        base = root / "sys/fs/cgroup/memory"
        if not controllers:
            base, limits, used = base.parent, ["memory.max", "memory.high"], "memory.current"
        elif "memory" not in controllers.split(","):
            continue
        # A container may see its own group as the root, under a path that exists on the machine only.
        steps = Path(group_path.lstrip("/")).parts
        for count in range(len(steps) + 1):
            group = base.joinpath(*steps[:count])
            limits_set = [int(value) for name in limits if (value := _read(group / name)) not in ("", "max")]
            if limits_set:
                yield min(limits_set) - int(_read(group / used)) + _reclaimed(_read(group / "memory.stat"))


def _reclaimed(stat: str) -> int:
    """`total_`: with the groups below, as version 1 counts usage."""
    fields = dict(line.split() for line in stat.splitlines())
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in _RECLAIMED)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # the group has no such file, or hides it from this process
        return ""


def keep_freed() -> bool:
    """From now on glibc keeps memory that is freed for the next passes; False with another library.

    Otherwise blocks of more than 128 KiB are mapped for themselves, or given back at the heap's end: a training step
    then has each page of its activations mapped and zeroed anew.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def give_back() -> None:
    """The memory that `keep_freed` kept goes back to the system: free blocks, and the end of this thread's heap.

    The heap's end goes when a block is freed there: `malloc_trim` knows that of the first thread's alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_BYTES)
    libc.free(libc.malloc(ctypes.c_size_t(_DEFAULT_TRIM_BYTES)))
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.malloc_trim(ctypes.c_size_t(0))


def swap(root: Path = Path("/")) -> int:
    """Free bytes of swap on the machine; 0 where unknown."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return int(dict(line.split(":", 1) for line in lines).get("SwapFree", "0 kB").split()[0]) * 1024
