"""Tools for a model whose chat template has none: the system's text describes them, and how to call them.

Calls are written as Hermes does, since many models have seen that.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from knapper.catalogue.tools import AgentMessage, Tool

_HEAD: Final = "You may call these functions. Each line is one of them, its parameters as a JSON schema:"
_TAIL: Final = (
    "To call a function, write its name and its arguments as JSON between these marks, once for each call:\n"
    '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
    "What it returns then comes between <tool_response> and </tool_response>."
)


def in_words(messages: Sequence[AgentMessage], tools: Sequence[Tool]) -> list[AgentMessage]:
    """The conversation with roles and contents only: what a template without tools can render."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    described = "\n".join([_HEAD, *(json.dumps(_function(tool), ensure_ascii=False) for tool in tools), _TAIL])
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{described}"}, *plain[1:]]
    return [{"role": "system", "content": described}, *plain]


def _plain(message: AgentMessage) -> AgentMessage:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = "\n".join(_written(message["tool_calls"]))
    content = f"{message['content']}\n{calls}" if message["content"] else calls
    return {"role": message["role"], "content": content}


def _written(calls: Iterable[Any]) -> Iterable[str]:
    for call in calls:
        named = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        yield f"<tool_call>\n{json.dumps(named, ensure_ascii=False)}\n</tool_call>"


def _function(tool: Tool) -> Any:
    return tool.as_template()["function"]
