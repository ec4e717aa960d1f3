"""YAML as plain data with line numbers. Read safely: no tags, aliases or duplicate keys, and bounded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import yaml
from yaml.events import CollectionEndEvent, CollectionStartEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from knapper import limits
from knapper.errors import UserError
from knapper.wire.untrusted import parsing

Path = tuple[str | int, ...]


class JobError(UserError):
    """job.yaml, or a file that it names, is invalid. `line`: of `file`, counted from 1."""

    code = "invalid_job"

    def __init__(
        self,
        line: int,
        field: str,
        value: object,
        allowed: str,
        todo: str = "",
        file: str = "job.yaml",
        message: str = "",
    ) -> None:  # fmt: skip
        shown = repr(value)
        self.shown = shown if len(shown) <= 120 else shown[:117] + "..."
        self.file, self.line, self.allowed, self.todo = file, line, allowed, todo
        problem = message or f"{field} is {self.shown}; allowed: {allowed}" + (f". {todo}" if todo else "")
        super().__init__(f"{file}, line {line}: {problem}")
        self.field = field

    def report(self) -> dict[str, object]:
        """The content of job.error.json."""
        return {
            "error": str(self), "code": self.code, "file": self.file, "line": self.line, "field": self.field,
            "value": self.shown, "allowed": self.allowed, "todo": self.todo,
        }  # fmt: skip


@dataclass(frozen=True)
class Document:
    """`content`: maps, lists, texts, numbers, true, false and null. `lines`: of each key and element."""

    text: bytes
    content: Any
    lines: Mapping[Path, int]

    def line(self, path: Path) -> int:
        """The line of the field; where it would be, if it is missing."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number and dates are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}


def read(data: bytes, bytes_max: int = limits.job_yaml_bytes_max) -> Document:
    """Raises JobError."""
    if len(data) > bytes_max:
        raise JobError(1, "its size in bytes", len(data), f"at most {bytes_max}")
    with parsing(lambda error: _unreadable(data, error)):
        loader = _Loader(data.decode())
        _check_events(data.decode())
        node = loader.get_single_node()
    if node is None:
        raise JobError(1, "its content", None, "a job: kind, data, steps, ... one `field: value` a line")
    lines: dict[Path, int] = {(): node.start_mark.line + 1}
    return Document(data, _content(loader, node, (), lines), lines)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader would not read as texts."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def write(content: Any) -> bytes:
    """What `read` reads as this content."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text.encode()


def _unreadable(data: bytes, error: Exception) -> JobError:
    if isinstance(error, UnicodeDecodeError):
        line = data[: error.start].count(b"\n") + 1
        return JobError(line, "its encoding", data[error.start : error.start + 4], "UTF-8")
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or "it cannot be read"
    line = mark.line + 1 if mark else 1
    return JobError(line, "its syntax", problem, "YAML: `field: value` lines", message=f"invalid YAML: {problem}")


def _check_events(text: str) -> None:
    """Checks that must come before anything is built. Raises JobError and YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if (anchor := getattr(event, "anchor", None)) is not None:
            raise JobError(line, "an anchor or alias", anchor, "plain values", "Write the value out")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > limits.job_yaml_depth_max:
            raise JobError(line, "its depth", "deeper", f"at most {limits.job_yaml_depth_max} levels")


def _content(loader: _Loader, node: Node, at: Path, lines: dict[Path, int]) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or key_node.tag not in _PLAIN:
                raise JobError(here, spoken(at) or "a field", "<<" if key == "<<" else "a list or a map", "a name")
            if key in mapping:
                raise JobError(here, spoken((*at, key)), "there a second time", "each field once")
            with parsing(partial(_no_name, here, key)):
                key.encode()
            lines[(*at, *key.split("."))] = here  # `a.b` has the path of `b` in `a`
            mapping[key] = _content(loader, value_node, (*at, key), lines)
        return mapping
    if isinstance(node, SequenceNode):
        items = []
        for n, item in enumerate(node.value):
            lines[(*at, n)] = item.start_mark.line + 1
            items.append(_content(loader, item, (*at, n), lines))
        return items
    if node.tag not in _PLAIN:
        raise JobError(line, spoken(at) or "the document", node.tag, "plain values: texts, numbers, true, false")
    with parsing(lambda _: JobError(line, spoken(at), node.value, "a number or a text that can be read")):
        value = loader.construct_object(node)
        msgspec.json.encode(value)  # no lone surrogates, and no more digits than a number has
    return value


def _no_name(line: int, key: str, _: Exception) -> JobError:
    return JobError(line, "the name of a field", key, "a text")


def spoken(path: Path) -> str:
    """`evaluate.data`, `reward[1].name`"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def path_of(field: str) -> Path:
    """The inverse of `spoken`."""
    steps = re.findall(r"([^.\[\]]+)|\[(\d+)\]", field)
    return tuple(name or int(index) for name, index in steps)
