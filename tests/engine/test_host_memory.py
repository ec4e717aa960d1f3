"""What a process can still take: less than the machine has, where a control group says so."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from knapper.engine import host_memory

GIB = 2**30
NO_LIMIT = 9223372036854771712  # how the first version says it


def machine(root: Path, available: int, groups: str) -> None:
    own = root / "proc/self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(f"{groups}\n")
    (root / "proc/meminfo").write_text(
        f"MemTotal: 999999999 kB\nMemFree: 1 kB\nMemAvailable:  {available // 1024} kB\n"
    )


def group(root: Path, where: str, limit: str, used: int, cached: int = 0, high: str = "max") -> None:
    """A group of the second version, `cached` bytes of which are pages of files."""
    at = root / "sys/fs/cgroup" / where
    at.mkdir(parents=True, exist_ok=True)
    (at / "memory.max").write_text(f"{limit}\n")
    (at / "memory.high").write_text(f"{high}\n")
    (at / "memory.current").write_text(f"{used}\n")
    (at / "memory.stat").write_text(
        f"anon {used - cached}\ninactive_file {cached // 4}\nactive_file {cached * 3 // 4}\n"
    )


def group_1(root: Path, where: str, limit: int, used: int, cached: int = 0) -> None:
    """One of the first; its own pages are fewer than those of the groups below it, which count too."""
    at = root / "sys/fs/cgroup/memory" / where
    at.mkdir(parents=True, exist_ok=True)
    (at / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (at / "memory.usage_in_bytes").write_text(f"{used}\n")
    (at / "memory.stat").write_text(
        f"inactive_file 4096\ntotal_inactive_file {cached // 2}\ntotal_active_file {cached // 2}\n"
    )


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    machine(tmp_path, 12 * GIB, "0::/user.slice/session.scope")
    group(tmp_path, "user.slice", "max", 3 * GIB)
    assert host_memory.available(tmp_path) == 12 * GIB


def test_a_container_has_what_its_group_leaves_and_pages_of_files_do_not_count(tmp_path: Path) -> None:
    machine(tmp_path, 100 * GIB, "0::/")
    group(tmp_path, "", str(8 * GIB), 5 * GIB, cached=2 * GIB)
    assert host_memory.available(tmp_path) == 5 * GIB


def test_the_narrowest_of_the_groups_above_counts(tmp_path: Path) -> None:
    machine(tmp_path, 100 * GIB, "0::/pods/pod1/engine")
    group(tmp_path, "pods", str(64 * GIB), 60 * GIB)
    group(tmp_path, "pods/pod1", "max", GIB, high=str(2 * GIB))
    group(tmp_path, "pods/pod1/engine", str(32 * GIB), GIB)
    assert host_memory.available(tmp_path) == GIB


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    machine(tmp_path, 100 * GIB, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/")
    group_1(tmp_path, "", NO_LIMIT, 50 * GIB)
    group_1(tmp_path, "docker/abc", 10 * GIB, 6 * GIB, cached=2 * GIB)
    assert host_memory.available(tmp_path) == 6 * GIB


def test_a_path_that_only_the_machine_has_leads_to_the_root_that_the_container_sees(tmp_path: Path) -> None:
    machine(tmp_path, 100 * GIB, "4:memory:/docker/abc")
    group_1(tmp_path, "", 10 * GIB, 4 * GIB)
    assert host_memory.available(tmp_path) == 6 * GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine(tmp_path, 100 * GIB, "0::/")
    group(tmp_path, "", str(GIB), 2 * GIB)
    assert host_memory.available(tmp_path) == 0


def test_on_another_system_it_is_half_of_the_memory(tmp_path: Path) -> None:
    half = host_memory.available(tmp_path)
    assert half * 2 == pytest.approx(_machine_bytes(), abs=2)


def test_of_this_machine_it_is_something_and_no_more_than_there_is() -> None:
    assert 0 < host_memory.available() <= _machine_bytes()


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# As a pass does it, on a thread of its own: a block beside which others live, freed and taken again.
TAKEN_AGAIN = """
import ctypes, resource, sys, threading
from knapper.engine import host_memory
if sys.argv[1] == "kept":
    assert host_memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
faults = []

def passes():
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(ctypes.c_size_t(40 << 20))
        libc.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t(40 << 20))
        libc.free(ctypes.c_void_p(block))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    resident = pages()
    host_memory.give_back()
    print(sum(faults[1:]), resident - pages())

def pages():
    return int(open("/proc/self/statm").read().split()[1])

thread = threading.Thread(target=passes)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library's allocator is left as it is")
def test_freed_memory_is_kept_for_the_next_pass_and_given_back_when_it_is_told() -> None:
    def measured(how: str) -> tuple[int, int]:
        """Page faults of seven passes after the first, and the pages that went back in the end."""
        command = [sys.executable, "-c", TAKEN_AGAIN, how]
        faults, returned = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(faults), int(returned)

    pages = (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert measured("as it is")[0] >= 7 * pages
    faults, returned = measured("kept")
    assert faults < pages
    assert returned > pages // 2
