"""What `terraform validate` would say, as far as it can be said without the providers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.terraform.reading import Document, blocks, names, plain, text_of
from tests.terraform.schema import Arguments

_META = {"for_each", "count", "depends_on", "provider", "lifecycle", "provisioner", "timeouts", "connection"}
_LITERALS: dict[str, Any] = {"string": str, "number": (int, float), "bool": bool, "list": list, "map": dict}


def findings(documents: dict[Path, Document], schema: dict[str, Arguments]) -> Iterator[str]:
    """Everything that is wrong, each with where."""
    for directory, document in documents.items():
        about = "/".join(directory.parts[-2:])
        for said in (*_declared(document), *_modules(directory, document, documents), *_schema(document, schema)):
            yield f"{about}: {said}"


def _declared(document: Document) -> Iterator[str]:
    """What is referred to is there, and what is there is described."""
    rest = {key: value for key, value in document.items() if key != "variable"}
    variables = {name: body for _, name, body in blocks(document, "variable")}
    for name, body in variables.items():
        yield from (f"variable {name}: no {key}" for key in ("description", "type") if key not in body)
    asked = names(r"\bvar\.(\w+)", document)
    yield from (f"var.{name} is not declared" for name in sorted(asked - set(variables)))
    yield from (f"variable {name} is not used" for name in sorted(set(variables) - names(r"\bvar\.(\w+)", rest)))
    yield from (
        f"output {name}: no description" for _, name, body in blocks(document, "output") if "description" not in body
    )
    local = {key for each in document.get("locals", []) for key in each if not key.startswith("__")}
    yield from (f"local.{name} is not there" for name in sorted(names(r"\blocal\.(\w+)", document) - local))
    for word, prefix in (("resource", r"(?<![\w.])"), ("data", r"\bdata\.")):
        there = {(kind, name) for kind, name, _ in blocks(document, word)}
        for kind, name in sorted(
            set(re.findall(prefix + r"((?:google|helm|local|terraform)_\w+)\.(\w+)", text_of(document)))
        ):
            if (kind, name) not in there:
                yield f"{word} {kind}.{name} is not there"


def _modules(directory: Path, document: Document, documents: dict[Path, Document]) -> Iterator[str]:
    called = {name: body for _, name, body in blocks(document, "module")}
    for name, body in called.items():
        target = (directory / plain(body["source"])).resolve()
        if target not in documents:
            yield f"module {name}: no module in {plain(body['source'])}"
            continue
        wanted = {each: about for _, each, about in blocks(documents[target], "variable")}
        given = {key for key in body if not key.startswith("__")} - _META - {"source", "version", "providers"}
        yield from (f"module {name}: {key} is none of its variables" for key in sorted(given - set(wanted)))
        needed = {key for key, about in wanted.items() if "default" not in about}
        yield from (f"module {name}: {key} is missing" for key in sorted(needed - given))
        outputs = {each for _, each, _ in blocks(documents[target], "output")}
        asked = names(rf"\bmodule\.{name}\.(\w+)", document)
        yield from (f"module {name} has no output {key}" for key in sorted(asked - outputs))
    asked = names(r"\bmodule\.(\w+)", document)
    yield from (f"module {name} is not called" for name in sorted(asked - set(called)))


def _schema(document: Document, schema: dict[str, Arguments]) -> Iterator[str]:
    for word, prefix in (("resource", ""), ("data", "data.")):
        for kind, name, body in blocks(document, word):
            if kind.startswith("google_"):
                about = f"{prefix}{kind}.{name}"
                if f"{prefix}{kind}" not in schema:
                    yield f"{about}: no such type in schemas/; run tests.terraform.schema if it is new"
                else:
                    yield from (f"{about}: {said}" for said in _body(body, schema[f"{prefix}{kind}"], outermost=True))


def _body(body: Document, arguments: Arguments, *, outermost: bool = False) -> Iterator[str]:
    given: dict[str, list[Any]] = {}
    for key, value in body.items():
        if key.startswith("__") or (outermost and key in _META):
            continue
        if key == "dynamic":
            for each in value:
                for name, about in each.items():
                    if not name.startswith("__"):
                        given.setdefault(plain(name), []).extend(about["content"])
        else:
            given.setdefault(plain(key), []).extend(value if _is_blocks(value) else [value])
    for name, values in given.items():
        if name not in arguments:
            yield f"{name} is no argument; there are {', '.join(sorted(arguments))}"
            continue
        about = arguments[name]
        for value in values:
            if about["kind"] == "block" and isinstance(value, dict):
                yield from (f"{name}.{said}" for said in _body(value, about["block"]))
            elif about["kind"] == "block" or (isinstance(value, dict) and value.get("__is_block__")):
                yield f"{name} is {'a block' if about['kind'] == 'block' else 'no block'}"
            else:
                yield from _literal(name, value, about["kind"])
    yield from (f"{name} is missing" for name, about in arguments.items() if about["required"] and name not in given)


def _is_blocks(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and each.get("__is_block__") for each in value)
    )


def _literal(name: str, value: object, kind: str) -> Iterator[str]:
    if isinstance(value, str) and value.startswith("${") and not value.startswith('"'):
        return  # an expression: its type is known when it is evaluated
    if not isinstance(value, _LITERALS[kind]) or (kind == "number" and isinstance(value, bool)):
        yield f"{name} is {value!r}, and should be a {kind}"
