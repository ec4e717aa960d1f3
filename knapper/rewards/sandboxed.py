"""Which work in cells each reward means, and what its results and its endings mean."""

from collections.abc import Mapping
from typing import Any

from knapper.errors import UserError
from knapper.rewards.plain import part
from knapper.rewards.rollouts import Rollout
from knapper.rewards.spec import Code, JsonSchema, Maths, PythonTests, Regex, Sql, Term, Textual
from knapper.sandbox.pool import Ended, Order, Sandbox

_TASKS = "knapper.rewards.tasks"
_PROGRAMS = "knapper.rewards.programs"
_EQUATIONS = "knapper.rewards.equations"
_QUERIES = "knapper.rewards.queries"
_judging_s = 3.0  # beyond the program's time, in which the tests do their own work


async def imports(term: Term, files: Mapping[str, str], sandbox: Sandbox) -> tuple[str, ...]:
    """What is loaded once for all rollouts, and not for each."""
    match term:
        case Code():
            order = Order(f"{_TASKS}:imports", {"code": files[term.code], "name": term.code}, term.timeout_s)
            return (_TASKS, *await _value(order, preload=(_TASKS,), sandbox=sandbox))
        case Maths():
            return (_EQUATIONS,)
        case JsonSchema():
            return (_TASKS, "jsonschema", "referencing")
        case Sql():
            return (_QUERIES,)
        case PythonTests():
            return (_PROGRAMS,)
    return (_TASKS,)


async def value(
    term: Term, rollout: Rollout, files: Mapping[str, str], preload: tuple[str, ...], sandbox: Sandbox
) -> float:
    """The term's value for the rollout. Raises UserError with the reason where there is none."""
    if isinstance(term, Textual) and part(term, rollout.completion) is None:
        return 0.0
    match term:
        case Code():
            arguments = {
                "name": term.code, "code": files[term.code],
                "prompt": rollout.prompt, "completion": rollout.completion, "answer": rollout.answer,
            }  # fmt: skip
            order = Order(f"{_TASKS}:user_code", arguments, term.timeout_s, rollout.id)
            return _number(await _value(order, preload=preload, sandbox=sandbox))
        case PythonTests():
            return await _python_tests(term, rollout, preload, sandbox)
        case Regex():
            arguments = {"pattern": term.pattern, "text": part(term, rollout.completion), "whole": term.whole}
            order = Order(f"{_TASKS}:regex", arguments, term.timeout_s, reads=True)
            return _number(await _value(order, preload=preload, sandbox=sandbox, sealed=False))
        case JsonSchema():
            arguments = {"text": part(term, rollout.completion), "schema": files[term.json_schema]}
            order = Order(f"{_TASKS}:json_schema", arguments, term.timeout_s, reads=True)
            return _number(await _value(order, preload=preload, sandbox=sandbox, sealed=False))
        case Maths():
            order, own = _maths(term, rollout)
            return await _compared(order, own, preload, sandbox)
        case Sql():
            order, own = _sql(term, rollout, files)
            return await _compared(order, own, preload, sandbox)
    raise NotImplementedError(type(term).__name__)


def _maths(term: Maths, rollout: Rollout) -> tuple[Order, Order]:
    answer = rollout.answer
    wanted = str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer
    if not isinstance(wanted, str):
        raise UserError(f"answer is {answer!r:.80}; maths allows a text or a number")
    return _order_and_own(f"{_EQUATIONS}:maths", {"answer": wanted}, term, rollout)


def _sql(term: Sql, rollout: Rollout, files: Mapping[str, str]) -> tuple[Order, Order]:
    answer = rollout.answer
    if not isinstance(answer, str) and not (isinstance(answer, list) and all(isinstance(row, list) for row in answer)):
        raise UserError(f"answer is {answer!r:.80}; sql allows a query, or a list of rows")
    arguments = {
        "script": files[term.database], "answer": answer, "ordered": term.ordered, "timeout_s": term.timeout_s,
    }  # fmt: skip
    return _order_and_own(f"{_QUERIES}:sql", arguments, term, rollout)


def _order_and_own(task: str, arguments: dict[str, Any], term: Maths | Sql, rollout: Rollout) -> tuple[Order, Order]:
    """The comparison of the completion with the answer, and of the answer with itself."""
    text, answer = part(term, rollout.completion), arguments["answer"]
    own = answer if isinstance(answer, str) else ""
    reads = isinstance(term, Maths)
    return (
        Order(task, {**arguments, "text": text}, term.timeout_s, reads=reads),
        Order(task, {**arguments, "text": own}, term.timeout_s, reads=reads),
    )


async def _compared(order: Order, own: Order, preload: tuple[str, ...], sandbox: Sandbox) -> float:
    """The value; 0 for a completion on which the comparison takes too long, or dies, if the answer itself is fine."""
    try:
        result = await sandbox.run(order, imports=preload)
    except Ended:
        await _value(own, preload=preload, sandbox=sandbox)
        return 0.0
    return _number(_checked(result))


async def _python_tests(term: PythonTests, rollout: Rollout, preload: tuple[str, ...], sandbox: Sandbox) -> float:
    tests = rollout.answer
    if not isinstance(tests, str) and not (
        isinstance(tests, list) and tests and all(isinstance(t, str) for t in tests)
    ):
        raise UserError(f"answer is {tests!r:.80}; python_tests allows Python with asserts, or a list of such texts")
    within_s = term.timeout_s + _judging_s
    program = {"program": part(term, rollout.completion)}
    judged = {
        "tests": tests, "partial": term.partial, "timeout_s": term.timeout_s,
        "functions": None if term.functions is None else list(term.functions),
        "code": tests if isinstance(tests, str) else "\n".join(tests),
    }  # fmt: skip
    return _number(
        await _value(
            Order(f"{_PROGRAMS}:program", program, within_s, rollout.id, ["program"]),
            Order(f"{_PROGRAMS}:tests", judged, within_s, rollout.id, ["code"]),
            preload=preload,
            sandbox=sandbox,
        )
    )


async def _value(*orders: Order, sandbox: Sandbox, preload: tuple[str, ...] = (), sealed: bool = True) -> Any:
    try:
        result = await sandbox.run(*orders, imports=preload, sealed=sealed)
    except Ended as error:
        raise UserError(str(error)) from error
    return _checked(result)


def _checked(result: object) -> Any:
    if isinstance(result, dict) and isinstance(reason := result.get("error"), str):
        raise UserError(reason)
    if not isinstance(result, dict) or "value" not in result:
        raise UserError("it wrote something else than a result into its result channel")
    return result["value"]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError("it wrote something else than a number into its result channel")
    return float(value)
