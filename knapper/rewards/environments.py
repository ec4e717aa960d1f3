"""What a cell computes for an environment: an episode from its start, with the turns that were sampled so far.

Imports the standard library only. The environment is made anew for every answer, and hears all earlier turns again: so
no process has to outlive an answer, and one that is lost loses nothing.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from knapper.rewards import tasks

_CLASS = "Environment"


class Wrong(Exception):
    """The environment does not do what it has to; the text says what, with the line of its code if one is known."""


def play(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """The digests of all its answers, and the last one in full; with the first also its tools."""
    name, code = arguments["name"], arguments["code"]
    tasks.show_lines_of(name, code)
    turns: list[Any] = arguments["turns"]
    try:
        environment = _made(name, code)
        prompt, answer = arguments["prompt"], arguments["answer"]
        said = _started(name, lambda: environment.reset(prompt, answer))
        digests = [_digest(said)]
        for n, message in enumerate(turns):
            said = _stepped(name, n + 1, environment, message)
            digests.append(_digest(said))
        tools = [] if turns else _tools(name, environment)
    except Wrong as error:
        return {"error": str(error)}
    return {"value": {"digests": digests, "said": said, "tools": tools}}


def _made(name: str, code: str) -> Any:
    module: dict[str, Any] = {"__name__": "environment", "__file__": name}
    _ran(name, "", lambda: exec(compile(code, name, "exec", dont_inherit=True), module))  # noqa: S102  the sandbox
    kind = module.get(_CLASS)
    if not isinstance(kind, type) or not all(callable(getattr(kind, each, None)) for each in ("reset", "step")):
        raise Wrong(f"{name} has no class `{_CLASS}` with `reset(self, prompt, answer)` and `step(self, message)`")
    return _ran(name, "", kind)


def _started(name: str, reset: Callable[[], Any]) -> dict[str, Any]:
    messages = _ran(name, "reset: ", reset)
    return {"messages": _messages(name, "reset", messages), "reward": 0.0, "done": False}


def _stepped(name: str, turn: int, environment: Any, message: Any) -> dict[str, Any]:
    answer = _ran(name, f"turn {turn}: ", lambda: environment.step(message))
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise Wrong(f"turn {turn}: step of {name} returned {_shown(answer)}; allowed: (messages, reward, done)")
    messages, reward, done = answer
    number = _ran(name, f"turn {turn}: ", lambda: tasks.number(reward, name))
    if "error" in number:
        raise Wrong(f"turn {turn}: the reward: {number['error']}")
    if not isinstance(done, bool):
        raise Wrong(f"turn {turn}: step of {name} returned done = {_shown(done)}; allowed: True, False")
    heard = [] if done else _messages(name, f"turn {turn}: step", messages)
    return {"messages": heard, "reward": number["value"], "done": done}


def _messages(name: str, at: str, messages: Any) -> Any:
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, list) or not messages:
        allowed = "a text, or a list of at least one message"
        raise Wrong(f"{at} of {name} returned messages = {_shown(messages)}; allowed: {allowed}")
    return _plain(f"{at} of {name} returned messages that are", messages)


def _tools(name: str, environment: Any) -> Any:
    tools = _ran(name, "tools: ", lambda: getattr(environment, "tools", []))
    return _plain(f"the tools of {name} are", tools)


def _plain(what: str, value: Any) -> Any:
    """As JSON has it: whatever the environment does with it later, it is this."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except Exception as error:
        raise Wrong(f"{what} not plain JSON: {str(error)[:200]}") from error


def _ran(name: str, at: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Wrong:
        raise
    except BaseException as error:
        raise Wrong(at + tasks.reason(error, name)) from error


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _shown(value: Any) -> str:
    """Without its own repr, which is the user's code."""
    plain = value is None or isinstance(value, bool | int | float) or type(value) is str
    return (
        f"{value!r}"[:100]
        if plain and not math.isnan(value if isinstance(value, float) else 0)
        else (f"a {type(value).__name__}")
    )
