"""Unit tests of a generated program: it runs in one cell, its tests in another, and between them goes plain data.

So a program can neither read the tests nor touch what decides about it: to pass, it has to give the right values. The
tests see each of its functions as one of their own; what a test changes in an argument the program's copy keeps. What a
program does beside giving values is noted here, in the tests' cell, and no test can swallow it.
"""

import builtins
import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any

from knapper import limits
from knapper.rewards import plaindata, tasks
from knapper.rewards.sources import Source


class ProgramEnded(BaseException):
    """The program's cell answers no more: it ended, or its time is over. No `except Exception` of a test catches it."""


class ProgramRaised(Exception):
    """The program raised an exception of a class that Python does not have built in, or gives a meaning of its own."""


class Unsendable(BaseException):
    """A test passes something that is not plain data: the test's fault."""


def program(arguments: dict[str, Any], link: int) -> None:
    """Run the program, then answer calls of its functions until the tests are over."""
    module: dict[Any, Any] = {"__name__": "program"}
    try:
        exec(compile(arguments["program"], "program.py", "exec", dont_inherit=True), module)  # noqa: S102
    except BaseException as error:  # noqa: BLE001  untrusted code fails in any way
        _send(link, {"failed": type(error).__name__})
        return
    public = [name for name in module if isinstance(name, str) and not name.startswith("__")][
        : limits.program_names_max
    ]
    values = {}
    for name in public:
        try:
            values[name] = plaindata.pack(module[name])
        except plaindata.NotPlain:
            continue
    _send(link, {"functions": [name for name in public if callable(module[name])], "values": values})
    while True:
        call = _receive(link, None)
        try:
            positional, named = plaindata.unpack(call["arguments"])
            answer = {"value": plaindata.pack(module[call["name"]](*positional, **named))}
        except Exception as error:  # noqa: BLE001  the same. SystemExit and its like end it, as they do any program
            answer = {"raised": type(error).__name__, "said": str(error)[:1000]}
        _send(link, answer)


def tests(arguments: dict[str, Any], link: int) -> dict[str, Any]:
    """1 if all tests pass, or the fraction that does."""
    given = arguments["tests"]
    try:
        sources = [Source.read(text) for text in ([given] if isinstance(given, str) else given)]
    except Exception as error:  # noqa: BLE001  any compile error is the text's fault
        return {"error": f"the tests are no Python: {tasks.reason(error, 'tests')}"}
    tested = Program(link, arguments["timeout_s"], arguments["functions"])
    if tested.failed:
        return {"value": 0.0, "reason": tested.failed}
    passed = 0
    for source in sources:
        tested.forget()
        wrong = _run(source, tested)
        if tested.fault:
            return {"error": tested.fault}
        passed += not (wrong or tested.deeds(source))
    fraction = passed / len(sources)
    result = {"value": fraction if arguments["partial"] else float(passed == len(sources))}
    return {**result, "reason": "the program ended, or ran over its time"} if tested.ended else result


def _run(source: Source, tested: "Program") -> bool:
    """Whether the test fails, as far as it says so itself."""
    names = tested.names()
    if source.lacks(names):  # else `try: f(-1)`, `except Exception: pass` would pass without any f
        return True
    tasks.show_lines_of("tests", source.text)
    try:
        exec(source.code, {"__name__": "tests", **names})  # noqa: S102  this is the sandbox
    except Unsendable as error:
        tested.fault = tasks.reason(error, "tests")
    except ImportError as error:
        if not tested.called:
            tested.fault = tasks.reason(error, "tests")
        return True
    except BaseException:  # noqa: BLE001  SystemExit is no verdict either
        return True
    return False


class Program:
    """The program as the tests see it. `failed`: why there is none. `fault`: of the tests.

    `ended`, `called`, `raised`, `not_a_number`: what happened while a test ran, whatever the test made of it.
    """

    def __init__(self, link: int, timeout_s: float, wanted: list[str] | None) -> None:
        self._link = link
        self._left_s = timeout_s
        self._names: dict[str, Any] = {}
        self.ended = self.called = self.raised = self.not_a_number = False
        self.failed = self.fault = ""
        try:
            offered = self._offered(self._ask(None))
        except ProgramEnded:
            self.failed = "the program ended, or ran over its time, while it was loaded"
            return
        if wanted is None:  # not Python's own: a program with an `abs` of its own would judge itself
            wanted = [name for name in offered if not hasattr(builtins, name) and not name.startswith("__")]
        self._names = {name: offered[name] for name in wanted if name in offered}

    def _offered(self, hello: dict[str, Any]) -> dict[str, Any]:
        if "failed" in hello:
            self.failed = f"the program raised {str(hello['failed'])[:100]} while it was loaded"
            return {}
        try:
            values = {str(name): _unpacked(value) for name, value in hello["values"].items()}
            functions = {str(name): self._function(str(name)) for name in hello["functions"]}
        except Exception as error:  # nonsense instead of the frame that `program` sends
            raise ProgramEnded from error
        return {name: value for name, value in values.items() if not plaindata.holds_nan(value)} | functions

    def names(self) -> dict[str, Any]:
        """What the tests find beside their own names."""
        return dict(self._names)

    def forget(self) -> None:
        """Another test begins. What ended stays so."""
        self.called = self.raised = self.not_a_number = False

    def deeds(self, source: Source) -> bool:
        """Whether it did something that fails this test, even if the test did not notice.

        An exception that nothing in the test can mean to catch was swallowed by Python itself: by an iteration, a
        `hasattr`. NaN is neither more nor less than anything, which `if error > limit: fail` takes for right.
        """
        swallowed = self.raised and not source.expects_errors
        return self.ended or swallowed or (self.not_a_number and not source.expects_nan)

    def _function(self, name: str) -> Callable[..., Any]:
        def function(*positional: Any, **named: Any) -> Any:
            try:
                packed = plaindata.pack((positional, named))
            except plaindata.TooDeep:  # of something that the program gave, perhaps
                raise
            except plaindata.NotPlain as error:
                self.fault = f"{name}(): {error}; tests may pass numbers, texts, lists, tuples, sets, dicts"
                raise Unsendable(self.fault) from error
            self.called = True
            answer = self._ask({"name": name, "arguments": packed})
            if "raised" in answer:
                self.raised = True
                raise _exception(str(answer["raised"]), str(answer.get("said")))
            self.not_a_number |= plaindata.holds_nan(answer["value"])
            return answer["value"]

        function.__name__ = name
        return function

    def _ask(self, message: object) -> dict[str, Any]:
        if self.ended:
            raise ProgramEnded
        started = time.monotonic()
        try:
            if message is not None:
                _send(self._link, message)
            answer = _receive(self._link, self._left_s)
            if not isinstance(answer, dict):
                raise ProgramEnded
            if message is not None and "raised" not in answer:
                answer["value"] = _unpacked(answer.get("value"))
        except ProgramEnded:
            self.ended = True  # a late answer must not be taken for the next one
            raise
        self._left_s -= time.monotonic() - started
        return answer


# What an iteration takes for its end: raised inside `map` or `zip`, it would end the test's loop without a failure.
_MEANT = (StopIteration, StopAsyncIteration)


def _exception(name: str, said: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _MEANT):
        try:
            return kind(said)
        except TypeError:  # it wants other arguments
            pass
    return ProgramRaised(f"{name}: {said}")


def _unpacked(value: Any) -> Any:
    try:
        return plaindata.unpack(value)
    except Exception as error:  # something that `pack` did not make
        raise ProgramEnded from error


def _send(link: int, message: object) -> None:
    content = json.dumps(message).encode()
    if len(content) > limits.program_message_bytes_max:
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
    if size > limits.program_message_bytes_max:
        raise ProgramEnded
    frame = _exactly(link, size, deadline)
    try:
        return json.loads(frame)
    except Exception as error:
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
