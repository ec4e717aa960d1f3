"""Grammars that a sampled text must follow, in llguidance's JSON form: what the gateway makes and the sampler obeys.

A grammar is a list of parts, JSON schemas and rules in Lark's notation; the first is where a text begins. llguidance
compiles it, within limits of its own; a schema is checked before, since a long chain of references would end the
process: it is compiled by recursion, on the stack.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from knapper import limits
from knapper.errors import InvalidField
from knapper.wire import json_values

# Between two JSON values one space, or a line and its indentation: without a bound a model may draw blanks for ever.
_WHITESPACE: Final = r"\x20|\n\x20{0,32}"
_ANNOTATIONS: Final = ("$comment", "default", "deprecated", "description", "examples", "readOnly", "title", "writeOnly")
_OPTIONS: Final = "x-guidance"  # options for llguidance itself, which it reads from a schema
_MAPS: Final = ("$defs", "definitions", "patternProperties", "properties")  # their keys are names, not keywords
_REASON_SHOWN: Final = 400  # characters
_TODO: Final = "Simplify the schema"


def json_part(schema: Mapping[str, Any] | bool, field: str) -> Mapping[str, Any]:
    """The schema as a part of a grammar, without what only describes. Raises InvalidField for one beyond the limits."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if _OPTIONS in schema:
        raise InvalidField(f"{field}.{_OPTIONS}", schema[_OPTIONS], "none: the server sets how JSON is written")
    _expect_shallow(schema, field)
    bare: dict[str, Any] = _without_annotations(schema)
    return {"json_schema": bare | {_OPTIONS: {"whitespace_pattern": _WHITESPACE}}}


def joined(first: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]], field: str) -> str:
    """A grammar that begins with `first`, which may refer to the others as `@name`. Raises InvalidField if too long."""
    parts = [dict(first), *({"name": name, **part} for name, part in named.items())]
    grammar = json.dumps({"grammars": parts}, ensure_ascii=False, separators=(",", ":"))
    if (size := len(grammar.encode())) > limits.grammar_bytes_max:
        raise InvalidField(f"{field}: bytes", size, f"up to {limits.grammar_bytes_max}, descriptions not counted")
    return grammar


def expect_compilable(grammar: str, field: str) -> None:
    """Raises InvalidField with llguidance's reason. Takes up to a second for the worst: call it in a thread."""
    from llguidance import LLMatcher

    if reason := LLMatcher.validate_grammar(grammar, limits=parser_limits()):
        allowed = "what llguidance supports (its docs/json_schema.md lists it)"
        raise InvalidField(field, "not supported", allowed, f"The reason: {in_short(reason)}")


def in_short(reason: str) -> str:
    """llguidance's reason on one line; it may quote a whole pattern."""
    line = " ".join(reason.split())
    return line if len(line) <= _REASON_SHOWN else f"{line[: _REASON_SHOWN // 2]} ... {line[-_REASON_SHOWN // 2 :]}"


def parser_limits() -> Any:
    """llguidance's bounds, for what one token may cost and what a grammar may hold in memory."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_lexer_fuel=limits.grammar_step_fuel,
        step_max_items=limits.grammar_step_items_max,
        max_lexer_states=limits.grammar_states_max,
        verbose_errors=False,
    )


def _expect_shallow(schema: Mapping[str, Any], field: str) -> None:
    """Bounds how deep the stack gets: at most by the schema's own nesting, and that of each target of a reference."""
    own = json_values.expect_shallow(schema, field, _TODO)
    levels: dict[int, int] = {}
    references: set[str] = set()
    _measure(schema, levels, references)
    whole = own + sum(levels.get(id(_target(schema, reference, field)), 0) for reference in references)
    if whole > limits.schema_levels_max:
        allowed = f"up to {limits.schema_levels_max} levels, those of each $ref's target added up"
        raise InvalidField(f"{field}: nesting", whole, allowed, _TODO)


def _measure(node: object, levels: dict[int, int], references: set[str]) -> int:
    """Levels of the node. Notes those of all lists and objects in it, by identity, and the references."""
    if not isinstance(node, (dict, list)):
        return 0
    if isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
        references.add(reference)
    levels[id(node)] = 1 + max((_measure(each, levels, references) for each in json_values.inside(node)), default=0)
    return levels[id(node)]


def _target(root: object, reference: str, field: str) -> object:
    """What a reference inside of the schema names. Raises InvalidField for any other."""
    node = root
    try:
        if reference != "#" and not reference.startswith("#/"):
            raise KeyError(reference)
        for step in reference.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            node = node[int(step)] if isinstance(node, list) else node[step]  # type: ignore[index]  # JSON
    except (KeyError, IndexError, TypeError, ValueError):
        allowed = "#, or #/... to a part of the same schema: nothing is fetched"
        raise InvalidField(f"{field}: $ref", reference, allowed) from None
    return node


def _without_annotations(node: Any, names: bool = False) -> Any:
    """`names`: the keys of `node` are names of properties or definitions."""
    if isinstance(node, list):
        return [_without_annotations(each) for each in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if names or key not in _ANNOTATIONS}
    return {
        key: value
        if not names and key in ("const", "enum")
        else _without_annotations(value, not names and key in _MAPS)
        for key, value in kept.items()
    }
