"""What cells compute for rewards: imports the standard library only, and the rest where it is used.

Every task answers `{"value": ...}`, or `{"error": reason}` where the reward itself is at fault; beside a value of 0 may
stand a `reason`, where the completion could not be looked at.
"""

import json
import linecache
import math
import re
import sys
import traceback
from types import TracebackType
from typing import Any

from knapper.sandbox import cell


def user_code(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """`reward(prompt, completion, answer)` of the user's file."""
    name, code = arguments["name"], arguments["code"]
    show_lines_of(name, code)
    try:
        module: dict[str, Any] = {"__name__": "reward", "__file__": name}
        exec(compile(code, name, "exec", dont_inherit=True), module)  # noqa: S102  this is the sandbox
        if not callable(function := module.get("reward")):
            return {"error": f"{name} has no function `reward(prompt, completion, answer)`"}
        value = function(arguments["prompt"], arguments["completion"], arguments["answer"])
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt are no numbers either
        return {"error": reason(error, name)}
    return number(value, name)


def imports(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """Those of the modules that the code names which this cell could load."""
    try:
        names = cell.imported(arguments["code"])
    except Exception as error:  # noqa: BLE001  any parse error is the text's fault
        return {"error": reason(error, arguments["name"])}
    return {"value": [name for name in names if name in sys.modules]}


def number(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return {"error": f"{name} returned {type(value).__name__}; allowed: a finite number"}
    try:
        result = float(value)
    except BaseException as error:  # noqa: BLE001  its __float__ is the user's code too
        return {"error": reason(error, name)}
    return (
        {"value": result} if math.isfinite(result) else {"error": f"{name} returned {result}; allowed: a finite number"}
    )


def reason(error: BaseException, name: str) -> str:
    """The error in a line, with the last line of `name` that it passed."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()
    said = text[-1][:200] if text else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{said} ({name}, line {error.lineno})"
    if isinstance(error, ImportError):
        said += "; the sandbox has the modules that are installed beside it and that an import statement names"
    if isinstance(error, PermissionError):
        said += "; the sandbox has no files, network or processes"
    if isinstance(error, MemoryError):
        said += "; the sandbox's memory is used up"
    line = line_of(error.__traceback__, name)
    return f"{said} ({name}, line {line}: {linecache.getline(name, line).strip()[:120]})" if line else said


def line_of(frames: TracebackType | None, name: str) -> int:
    line = 0
    while frames is not None:
        if frames.tb_frame.f_code.co_filename == name:
            line = frames.tb_lineno
        frames = frames.tb_next
    return line


def show_lines_of(name: str, code: str) -> None:
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)


def regex(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    search = re.fullmatch if arguments["whole"] else re.search
    return {"value": float(search(arguments["pattern"], arguments["text"]) is not None)}


def json_schema(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    try:
        import jsonschema
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        return {"error": "jsonschema is not installed; allowed: `pip install 'knapper[reward]'`"}
    try:
        schema = json.loads(arguments["schema"])
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
        validator = kind(schema, registry=Registry())  # an empty one: nothing is fetched
        simplest: list[Any] = [None, True, 0, "", [], {}]
        for simple in simplest:  # what fails on these fails on anything
            validator.is_valid(simple)
    except jsonschema.SchemaError as error:
        return {"error": f"the schema is no JSON schema: {error.message[:200]}"}
    except Exception as error:  # noqa: BLE001  no JSON, a reference that leads nowhere, or back to itself
        return {"error": f"the schema cannot be used: {type(error).__name__}: {str(error)[:200]}"}
    try:
        value = json.loads(arguments["text"], parse_constant=_no_number, parse_float=_finite)
        return {"value": float(validator.is_valid(value))}
    except (Unresolvable, re.error) as error:  # a reference, or a pattern, that only some texts reach
        return {"error": f"the schema cannot be used: {str(error)[:200]}"}
    except Exception as error:  # noqa: BLE001  no JSON, or too deep or large to check
        return {"value": 0.0, "reason": f"{type(error).__name__}: {str(error)[:200]}"}


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is no number of JSON that can be computed with")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)
