"""Unit tests of a generated program: it runs in one cell, its tests in another, and between them goes plain data.

So a program can neither read the tests nor touch what decides about it: to pass, it has to give the right values. The
tests see each of its functions as one of their own; what a test changes in an argument the program's copy keeps.
"""

import builtins
import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any

from knapper.rewards import plaindata, tasks

_frame_bytes_max = 1024 * 1024
_names_max = 1000


class ProgramEnded(Exception):
    """The program's cell answers no more: it ended, or its time is over."""


class ProgramRaised(Exception):
    """The program raised an exception of a class that Python does not have built in."""


class Unsendable(Exception):
    """A test passes something that is not plain data: the test's fault."""


def program(arguments: dict[str, Any], link: int) -> None:
    """Run the program, then answer calls of its functions until the tests are over."""
    module: dict[Any, Any] = {"__name__": "program"}
    try:
        exec(compile(arguments["program"], "program.py", "exec", dont_inherit=True), module)  # noqa: S102
    except BaseException as error:  # noqa: BLE001  code of others fails in any way it likes
        _send(link, {"failed": type(error).__name__})
        return
    public = [name for name in module if isinstance(name, str) and not name.startswith("__")][:_names_max]
    values = {}
    for name in public:
        try:
            values[name] = plaindata.pack(module[name])
        except (plaindata.NotPlain, RecursionError):
            continue
    _send(link, {"functions": [name for name in public if callable(module[name])], "values": values})
    while True:
        call = _receive(link, None)
        try:
            positional, named = plaindata.unpack(call["arguments"])
            answer = {"value": plaindata.pack(module[call["name"]](*positional, **named))}
        except BaseException as error:  # noqa: BLE001  the same
            answer = {"raised": type(error).__name__, "said": str(error)[:1000]}
        _send(link, answer)


def tests(arguments: dict[str, Any], link: int) -> dict[str, Any]:
    """1 if all tests pass, or the fraction that does."""
    given = arguments["tests"]
    sources = [given] if isinstance(given, str) else given
    try:
        compiled = [compile(source, "tests", "exec", dont_inherit=True) for source in sources]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"error": f"the tests are no Python: {tasks.reason(error, 'tests')}"}
    tested = Program(link, arguments["timeout_s"], arguments["functions"])
    passed = 0
    for source, code in zip(sources, compiled, strict=True):
        tasks.show_lines_of("tests", source)
        try:
            exec(code, {"__name__": "tests", **tested.names()})  # noqa: S102  this is the sandbox
        except Unsendable as error:
            return {"error": tasks.reason(error, "tests")}
        except Exception:  # noqa: BLE001, S112  a test that fails
            continue
        passed += 1
    fraction = passed / len(sources)
    return {"value": fraction if arguments["partial"] else float(passed == len(sources))}


class Program:
    """The program as the tests see it."""

    def __init__(self, link: int, timeout_s: float, wanted: list[str] | None) -> None:
        self._link = link
        self._left_s = timeout_s
        self._ended = False
        self._names: dict[str, Any] = {}
        try:
            hello = self._ask(None)
            values = {name: _unpacked(value) for name, value in hello["values"].items()}
            functions = {name: self._function(name) for name in hello["functions"]}
        except (ProgramEnded, AttributeError, KeyError, TypeError):
            return  # it failed while it was loaded, or says nonsense: the tests find nothing of it
        offered = {**values, **functions}
        if wanted is None:  # not Python's own: a program with an `abs` of its own would judge itself
            wanted = [name for name in offered if not hasattr(builtins, name) and not name.startswith("__")]
        self._names = {name: offered[name] for name in wanted if name in offered}

    def names(self) -> dict[str, Any]:
        """What the tests find beside their own names."""
        return dict(self._names)

    def _function(self, name: str) -> Callable[..., Any]:
        def function(*positional: Any, **named: Any) -> Any:
            try:
                packed = plaindata.pack((positional, named))
            except plaindata.NotPlain as error:
                raise Unsendable(
                    f"{name}(): {error}; tests may pass numbers, texts, lists, tuples, sets, dicts"
                ) from error
            answer = self._ask({"name": name, "arguments": packed})
            if "raised" in answer:
                raise _exception(str(answer["raised"]), str(answer.get("said")))
            return _unpacked(answer.get("value"))

        function.__name__ = name
        return function

    def _ask(self, message: object) -> dict[str, Any]:
        if self._ended:
            raise ProgramEnded
        started = time.monotonic()
        try:
            if message is not None:
                _send(self._link, message)
            answer = _receive(self._link, self._left_s)
        except ProgramEnded:
            self._ended = True  # a late answer must not be taken for the next one
            raise
        self._left_s -= time.monotonic() - started
        if not isinstance(answer, dict):
            raise ProgramEnded
        return answer


def _exception(name: str, said: str) -> Exception:
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and name not in ("UnicodeDecodeError", "UnicodeEncodeError")
    ):
        try:
            return kind(said)
        except TypeError:
            pass
    return ProgramRaised(f"{name}: {said}")


def _unpacked(value: Any) -> Any:
    try:
        return plaindata.unpack(value)
    except (ValueError, TypeError, KeyError, RecursionError, IndexError) as error:
        raise ProgramEnded from error


def _send(link: int, message: object) -> None:
    content = json.dumps(message).encode()
    if len(content) > _frame_bytes_max:
        raise ProgramEnded
    frame = struct.pack("!I", len(content)) + content
    try:
        while frame:
            frame = frame[os.write(link, frame) :]
    except OSError as error:
        raise ProgramEnded from error


def _receive(link: int, within_s: float | None) -> Any:
    deadline = None if within_s is None else time.monotonic() + within_s
    (size,) = struct.unpack("!I", _exactly(link, 4, deadline))
    if size > _frame_bytes_max:
        raise ProgramEnded
    try:
        return json.loads(_exactly(link, size, deadline))
    except (ValueError, RecursionError) as error:
        raise ProgramEnded from error


def _exactly(link: int, size: int, deadline: float | None) -> bytes:
    received = b""
    while len(received) < size:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([link], [], [], left_s)[0]:
            raise ProgramEnded
        if not (chunk := os.read(link, size - len(received))):
            raise ProgramEnded
        received += chunk
    return received
