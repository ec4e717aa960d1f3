"""Tools that a model may call: what a client says of them, what a call is, and the calls in a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from knapper.wire import grammars

AgentMessage = Mapping[str, Any]  # a message as chat templates take it, with its calls and what a result belongs to


@dataclass(frozen=True)
class Tool:
    """`parameters`: the JSON schema of its arguments, an object's."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def as_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def part(self, field: str) -> Mapping[str, Any]:
        """Its arguments as a part of a grammar. Raises InvalidField."""
        return grammars.json_part({"type": "object", **self.parameters}, field)


@dataclass(frozen=True)
class ToolCall:
    """`arguments`: a JSON object, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolUse:
    """The tools that a request offers, and whether one must be called. `name`: the one that must be.

    `several`: whether one answer may call more than once.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    several: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """Those that the model hears of."""
        return () if self.choice == "none" else self.tools

    @property
    def forced(self) -> tuple[Tool, ...]:
        """Those of which one must be called; none if the model may answer in words."""
        if self.choice != "required":
            return ()
        return tuple(tool for tool in self.tools if self.name in (None, tool.name))
