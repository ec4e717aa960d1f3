"""What happens in a cell: a forked process that closes every door behind it, and then runs the task of one order."""

import ast
import errno
import importlib
import io
import json
import os
import random
import resource
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from knapper import limits
from knapper.sandbox import layers, seccomp

Task = Callable[[dict[str, Any], int], object]  # arguments and the link's file descriptor, or -1

# What Python loads late, or tasks use, for the warden to load; after the seal nothing can be loaded any more.
COMMON = (
    "_strptime", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "contextlib",
    "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "encodings.ascii", "encodings.idna",
    "encodings.latin_1", "encodings.unicode_escape", "encodings.utf_16", "encodings.utf_8_sig", "enum",
    "fractions", "functools", "hashlib", "heapq", "html", "io", "itertools", "math", "numbers", "operator",
    "pprint", "queue", "random", "re", "select", "statistics", "string", "stringprep", "struct", "textwrap",
    "time", "timeit", "tokenize", "traceback", "types", "typing", "unicodedata", "warnings", "zlib",
)  # fmt: skip


def load(names: Iterable[str]) -> None:
    """Import these. What cannot be imported is left to fail in the code that names it.

    Raises RuntimeError for a module that ends the program that imports it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001, S112  a process border: an installed module fails in any way it likes
            continue
        except BaseException as error:
            raise RuntimeError(f"importing {name} raised {type(error).__name__}") from error


def imported(code: str) -> list[str]:
    """The modules that import statements of the code name. Raises some Exception where it is no Python."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found[node.module] = None
            found |= dict.fromkeys(f"{node.module}.{alias.name}" for alias in node.names if alias.name != "*")
    # Two that act when they are imported, and all that would run as a program.
    return [name for name in found if name not in ("antigravity", "this") and "__main__" not in name][
        : limits.sandbox_imports_max
    ]


def run(order: dict[str, Any], end: int, link: int, warden: int, *, seal: bool) -> NoReturn:
    """Load, close the doors, run the task, write what it gives. Without `seal` only where the machine has none."""
    close_all_but(end, link)
    layers.die_with_parent(warden)
    layers.limit(cpu_s=int(order["timeout_s"]) + 2)
    if not order["trial"]:
        resource.setrlimit(resource.RLIMIT_AS, (limits.sandbox_loading_bytes, limits.sandbox_loading_bytes))
    if seal:
        seccomp.install("loading")
    module, _, name = order["task"].partition(":")
    task: Task = getattr(importlib.import_module(module), name)
    for key in order["codes"]:
        try:
            names = imported(order["arguments"][key])
        except Exception:  # noqa: BLE001, S112  no Python: the task says so, with the line
            continue
        load(names)
    random.seed(order["seed"])
    if seal:
        if not order["reads"]:  # root's files may be for root only
            layers.drop_root()
            layers.die_with_parent(warden)  # again: another user's process has forgotten it
        layers.limit_memory(limits.sandbox_memory_bytes)
        seccomp.install("reading" if order["reads"] else "sealed")
    result = task(order["arguments"], link)
    # json, and not repr: whatever a task gives, the caller reads plain data
    content = json.dumps(result).encode()
    while content:
        content = content[os.write(end, content) :]
    os._exit(0)


def close_all_but(end: int, link: int) -> None:
    """Of the warden's files nothing stays open but these. 0, 1 and 2 lead nowhere."""
    nowhere = os.open("/dev/null", os.O_RDONLY)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    keep = sorted(fd for fd in (end, link) if fd >= 0)
    for below, above in zip([2, *keep], [*keep, 4096], strict=True):
        os.closerange(below + 1, above)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), _Discarding(), _Discarding()


class _Discarding(io.TextIOBase):
    """Takes what is printed, keeps nothing: giant output costs time only."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def prove(end: int) -> int:
    """In a cell of its own: write `sealed`, or what a sealed process could still do."""
    layers.limit(cpu_s=5)
    layers.limit_memory(limits.sandbox_memory_bytes)
    seccomp.install("loading")
    seccomp.install("sealed")
    attempts: dict[str, Callable[[], object]] = {
        "open a socket": socket.socket,
        "open a file": lambda: os.open("/proc/self/status", os.O_RDONLY),
        "start a process": os.fork,
        "signal a process": lambda: os.kill(os.getppid(), 0),
        "pass its memory limit": lambda: bytearray(2 * limits.sandbox_memory_bytes),
        "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_CPU, (100, 100)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except MemoryError:
            continue
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno == errno.EPERM:
                continue
        os.write(end, name.encode())
        return 0
    os.write(end, b"sealed")
    return 0
