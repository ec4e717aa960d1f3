"""The work in cells for each reward, and the meaning of its results and endings."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knapper import limits
from knapper.errors import UserError
from knapper.rewards.plain import check, part
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.spec import Code, JsonSchema, Maths, PythonTests, Regex, Sql, Term, Textual
from knapper.sandbox.pool import Ended, Order, Sandbox

_TASKS = "knapper.rewards.tasks"
_PROGRAMS = "knapper.rewards.programs"
_EQUATIONS = "knapper.rewards.equations"
_QUERIES = "knapper.rewards.queries"


@dataclass(frozen=True)
class SandboxResult:
    """`reason`: why it is 0 although nothing was compared, where the completion is at fault for that."""

    value: float
    reason: str = ""


async def imports(term: Term, files: Mapping[str, str], sandbox: Sandbox) -> tuple[str, ...]:
    """The work loaded once for all rollouts. Raises UserError."""
    match term:
        case Code():
            return (_TASKS, *await loadable(term.code, files[term.code], sandbox))
        case Maths():
            return (_EQUATIONS,)
        case JsonSchema():
            return (_TASKS, "jsonschema", "referencing")
        case Sql():
            return (_QUERIES,)
        case PythonTests():
            return (_PROGRAMS,)
    return (_TASKS,)


async def loadable(name: str, code: str, sandbox: Sandbox) -> tuple[str, ...]:
    """What the code imports, as far as a cell could load it. Raises UserError."""
    key = hashlib.sha256(code.encode()).hexdigest()
    return await sandbox.loaded.get(key, lambda: _loaded(name, code, sandbox))


async def _loaded(name: str, code: str, sandbox: Sandbox) -> tuple[str, ...]:
    """The code's loadable imports, tried in a cell: one that exits or hangs would end every warden."""
    order = Order(
        f"{_TASKS}:imports", {"code": code, "name": name}, limits.reward_loading_s, codes=["code"], trial=True
    )
    try:
        return tuple(map(str, await _value(order, preload=(_TASKS,), sandbox=sandbox)))
    except Ended as error:
        raise UserError(f"{name}: loading what it imports: {error}") from error


async def value(
    term: Term, rollout: ScorableRollout, files: Mapping[str, str], preload: tuple[str, ...], sandbox: Sandbox
) -> SandboxResult:
    """The term's value for the rollout. Raises UserError with the reason where the reward or the answer is at fault."""
    check(term, rollout.answer)
    if isinstance(term, Textual) and part(term, rollout.completion) is None:
        return SandboxResult(0.0)
    match term:
        case Code():
            arguments = {
                "name": term.code, "code": files[term.code],
                "prompt": rollout.prompt, "completion": rollout.completion, "answer": rollout.answer,
            }  # fmt: skip
            order = Order(f"{_TASKS}:user_code", arguments, term.timeout_s, rollout.id)
            return SandboxResult(_number(await _value(order, preload=preload, sandbox=sandbox)))
        case PythonTests():
            return await _python_tests(term, rollout, preload, sandbox)
        case Regex():
            arguments = {"pattern": term.pattern, "text": part(term, rollout.completion), "whole": term.whole}
            order = Order(f"{_TASKS}:regex", arguments, term.timeout_s, reads=True)
            return await _judged(order, preload=preload, sandbox=sandbox, sealed=False)
        case JsonSchema():
            arguments = {"text": part(term, rollout.completion), "schema": files[term.json_schema]}
            order = Order(f"{_TASKS}:json_schema", arguments, term.timeout_s, reads=True)
            return await _judged(order, preload=preload, sandbox=sandbox, sealed=False)
        case Maths():
            order, own = _maths(term, rollout)
            return await _judged(order, preload=preload, sandbox=sandbox, own=(own,))
        case Sql():
            order, own = _sql(term, rollout, files)
            return await _judged(order, preload=preload, sandbox=sandbox, own=(own,))
    raise NotImplementedError(type(term).__name__)


def _maths(term: Maths, rollout: ScorableRollout) -> tuple[Order, Order]:
    return _order_and_own(f"{_EQUATIONS}:maths", {"answer": str(rollout.answer)}, term, rollout)


def _sql(term: Sql, rollout: ScorableRollout, files: Mapping[str, str]) -> tuple[Order, Order]:
    arguments = {
        "script": files[term.database], "answer": rollout.answer, "ordered": term.ordered,
        "timeout_s": term.timeout_s,
    }  # fmt: skip
    return _order_and_own(f"{_QUERIES}:sql", arguments, term, rollout)


def _order_and_own(
    task: str, arguments: dict[str, Any], term: Maths | Sql, rollout: ScorableRollout
) -> tuple[Order, Order]:
    """The comparison of the completion with the answer, and of the answer with itself."""
    text, answer = part(term, rollout.completion), arguments["answer"]
    own = answer if isinstance(answer, str) else ""
    reads = isinstance(term, Maths)
    return (
        Order(task, {**arguments, "text": text}, term.timeout_s, reads=reads),
        Order(task, {**arguments, "text": own}, term.timeout_s, reads=reads),
    )


async def _python_tests(
    term: PythonTests, rollout: ScorableRollout, preload: tuple[str, ...], sandbox: Sandbox
) -> SandboxResult:
    tests = rollout.answer
    assert isinstance(tests, str | list), "it was checked"
    within_s = term.timeout_s + limits.reward_judging_s
    program = {"program": part(term, rollout.completion)}
    judged = {
        "tests": tests, "partial": term.partial, "timeout_s": term.timeout_s,
        "functions": None if term.functions is None else list(term.functions),
        "code": tests if isinstance(tests, str) else "\n".join(tests),
    }  # fmt: skip
    tested = Order(f"{_PROGRAMS}:tests", judged, within_s, rollout.id, ["code"])
    asked, empty = (
        Order(f"{_PROGRAMS}:program", each, within_s, rollout.id, ["program"]) for each in (program, {"program": ""})
    )
    return await _judged(asked, tested, preload=preload, sandbox=sandbox, own=(empty, tested))


async def _judged(
    *orders: Order, preload: tuple[str, ...], sandbox: Sandbox, own: tuple[Order, ...] = (), sealed: bool = True
) -> SandboxResult:
    """The value. 0 for a completion on which the work takes too long, or dies, if `own`, without it, does not."""
    try:
        result = await sandbox.run(*orders, imports=preload, sealed=sealed)
    except Ended as error:
        if own:
            await _value(*own, preload=preload, sandbox=sandbox)
        return SandboxResult(0.0, str(error))
    return SandboxResult(_number(_checked(result)), str(result.get("reason", "")))


async def result_of(*orders: Order, sandbox: Sandbox, preload: tuple[str, ...] = ()) -> Any:
    """What the last order's task gives as its value. Raises UserError with the reason where it gives none."""
    return await _value(*orders, preload=preload, sandbox=sandbox)


async def _value(*orders: Order, sandbox: Sandbox, preload: tuple[str, ...] = (), sealed: bool = True) -> Any:
    return _checked(await sandbox.run(*orders, imports=preload, sealed=sealed))


def _checked(result: object) -> Any:
    if isinstance(result, dict) and isinstance(reason := result.get("error"), str):
        raise UserError(reason)
    if not isinstance(result, dict) or "value" not in result:
        raise UserError("it wrote something else than a result into its result channel")
    return result["value"]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError("it wrote something else than a number into its result channel")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"it wrote {number} into its result channel; allowed: a finite number")
    return number
