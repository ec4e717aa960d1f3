"""The filters, instruction by instruction, for both machines: what they let pass is the list and nothing else."""

import errno
import itertools
import re
import struct
from pathlib import Path

import pytest

from knapper.sandbox import seccomp
from knapper.sandbox.syscalls import NUMBERS, STAGES, Stage, Unless

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
CASES = [(stage, machine) for stage in STAGES for machine in MACHINES]


def verdict(code: bytes, number: int, architecture: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel does with such a call: the classic BPF machine, as <linux/filter.h> describes it."""
    call = struct.pack("<IIQ6Q", number, architecture, 0, *(*arguments, *[0] * (6 - len(arguments))))
    accumulator, at = 0, 0
    while True:
        operation, yes, no, value = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", call, value)
            case 0x15:
                at += yes if accumulator == value else no
            case 0x45:
                at += yes if accumulator & value else no
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(hex(operation))


@pytest.mark.parametrize(("stage", "machine"), CASES)
def test_exactly_the_listed_calls_pass(stage: Stage, machine: str) -> None:
    column, architecture = MACHINES[machine]
    code = seccomp.compiled(stage, machine)
    allowed = {NUMBERS[name][column] for name in STAGES[stage]} - {None}
    passing = {number for number in range(600) if verdict(code, number, architecture) == ALLOW}
    assert passing == allowed
    assert {verdict(code, number, architecture) for number in range(600)} == {ALLOW, EPERM, ENOSYS}
    assert verdict(code, 435, architecture) == ENOSYS  # clone3: glibc then takes clone, whose flags can be seen


@pytest.mark.parametrize(("stage", "machine"), CASES)
def test_calls_of_another_architecture_end_the_process(stage: Stage, machine: str) -> None:
    column, architecture = MACHINES[machine]
    code = seccomp.compiled(stage, machine)
    read = NUMBERS["read"][column]
    assert read is not None
    for other in (0x40000003, 0xC000003E, 0xC00000B7):  # i386 and both of ours
        assert verdict(code, read, other) == (ALLOW if other == architecture else KILL)
    assert verdict(code, 0x40000000 | read, architecture) == EPERM  # x32's numbers, on x86_64


@pytest.mark.parametrize(("stage", "machine"), CASES)
def test_flags_decide_where_the_list_says_so(stage: Stage, machine: str) -> None:
    column, architecture = MACHINES[machine]
    code = seccomp.compiled(stage, machine)
    for name, rule in STAGES[stage].items():
        number = NUMBERS[name][column]
        if not isinstance(rule, Unless) or number is None:
            continue
        for bit in (1 << n for n in range(32)):
            arguments = (0,) * rule.argument + (bit,)
            assert verdict(code, number, architecture, arguments) == (EPERM if rule.bits & bit else ALLOW), name


def test_each_stage_allows_a_part_of_the_one_before() -> None:
    lists = [set(STAGES[stage]) for stage in ("warden", "loading", "reading", "sealed")]
    assert all(wider > narrower for wider, narrower in itertools.pairwise(lists))


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_has_a_network_a_program_or_a_way_to_write(stage: Stage) -> None:
    never = {
        "socket", "connect", "bind", "listen", "sendto", "sendmsg", "execve", "execveat", "ptrace", "bpf",
        "mount", "unlink", "unlinkat", "rename", "renameat", "mkdir", "truncate", "ftruncate", "memfd_create",
        "openat2", "io_uring_setup", "unshare", "setns", "process_vm_writev", "pidfd_open", "userfaultfd",
        "keyctl", "perf_event_open",
    }  # fmt: skip
    assert not never & set(STAGES[stage])


@pytest.mark.parametrize(
    ("column", "header", "pattern"),
    [
        (0, "x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
        (1, "asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)$"),
    ],
)
def test_the_numbers_are_those_of_the_kernel(column: int, header: str, pattern: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    known = dict(re.findall(pattern, path.read_text(), flags=re.MULTILINE))
    known.setdefault("newfstatat", known.get("fstatat", ""))  # its name in the generic list
    for name, numbers in NUMBERS.items():
        if (number := numbers[column]) is None:
            assert name not in known
        else:
            assert known[name] == str(number), name
