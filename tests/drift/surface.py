"""What the tinker SDK of this environment shows: `python -m tests.drift.surface` prints it as JSON.

It is run in environments that hold another SDK than the checkout's, so it imports nothing else.
"""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tinker
import tinker.types

Surface = dict[str, dict[str, str]]
_ROUTE = re.compile(r'"(/api/v1/[^"?\s]*)"')


def surface() -> Surface:
    """Kind -> name -> how it looks: methods of the clients, fields of the messages, and the routes in the source."""
    return {"method": dict(_methods()), "field": dict(_fields()), "route": dict.fromkeys(sorted(_routes()), "")}


def _methods() -> Iterator[tuple[str, str]]:
    for client_name, client in sorted(inspect.getmembers(tinker, inspect.isclass)):
        if not client_name.endswith("Client"):
            continue
        for name, member in inspect.getmembers(client, callable):
            if not name.startswith("_"):
                yield f"{client_name}.{name}", str(inspect.signature(member))


def _fields() -> Iterator[tuple[str, str]]:
    for message_name, message in sorted(inspect.getmembers(tinker.types, inspect.isclass)):
        fields: Any = getattr(message, "model_fields", {})  # of pydantic's models
        for name, field in fields.items():
            yield f"{message_name}.{name}", f"{field.annotation}{'' if field.is_required() else ', optional'}"


def _routes() -> set[str]:
    sources = Path(tinker.__file__).parent.rglob("*.py")
    return {route for source in sources for route in _ROUTE.findall(source.read_text(encoding="utf-8"))}


def differences(ours: Surface, newest: Surface) -> list[str]:
    """A line for each thing that is new, gone or changed."""
    lines = []
    for kind in ours.keys() | newest.keys():
        before, after = ours.get(kind, {}), newest.get(kind, {})
        lines += [f"new {kind} {name} {after[name]}".rstrip() for name in after.keys() - before.keys()]
        lines += [f"gone {kind} {name}" for name in before.keys() - after.keys()]
        both = before.keys() & after.keys()
        changed = (name for name in both if before[name] != after[name])
        lines += [f"changed {kind} {name}: {before[name]} -> {after[name]}" for name in changed]
    return sorted(lines)


if __name__ == "__main__":
    print(json.dumps({"version": tinker.__version__, "surface": surface()}))
