"""What has no fixed shape in chats (schemas of tools, arguments of calls) is bounded in depth, in all three protocols:
decoded in another process it is pickled, and echoed, rendered and counted it is gone through by recursion.
"""

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from gateway.anthropic import schemas as anthropic
from gateway.openai import schemas as openai
from gateway.responses import schemas as responses
from knapper import limits
from knapper.errors import InvalidField

HI = [{"role": "user", "content": "hi"}]
FLAT = {"type": "function", "name": "f"}


def nested(levels: int) -> dict[str, Any]:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return dict(value)


def chat(more: dict[str, Any]) -> object:
    return openai.chat(json.dumps({"model": "m", "messages": HI} | more).encode())


def message(more: dict[str, Any]) -> object:
    return anthropic.messages(json.dumps({"model": "m", "max_tokens": 1, "messages": HI} | more).encode())


def response(more: dict[str, Any]) -> object:
    return responses.responses(json.dumps({"model": "m", "input": "hi"} | more).encode())


PLACES: dict[str, tuple[Callable[[dict[str, Any]], object], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "tools[0].parameters: nesting": (
        chat, lambda value: {"tools": [{"type": "function", "function": {"name": "f", "parameters": value}}]}),
    "messages[0].tool_calls[0].function.arguments": (
        chat, lambda value: {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(value)}}]}, *HI]}),
    "tools[0].parameters: nesting of Anthropic's": (
        message, lambda value: {"tools": [{"name": "f", "input_schema": value}]}),
    "messages[0].content[0].input: nesting": (
        message, lambda value: {"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "1", "name": "f", "input": value}]}, *HI]}),
    "tools[0].parameters: nesting of responses": (response, lambda value: {"tools": [FLAT | {"parameters": value}]}),
    "input[0].arguments": (
        response, lambda value: {"input": [
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": json.dumps(value)}, *HI]}),
    "text.format.json_schema.schema: nesting": (
        response, lambda value: {"text": {"format": {"type": "json_schema", "name": "n", "schema": value}}}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_has_no_fixed_shape_is_bounded_in_depth(place: str) -> None:
    asked, at = PLACES[place]
    assert pickle.dumps(asked(at(nested(limits.json_nesting_max))))
    for levels in (limits.json_nesting_max + 1, 450, 700):
        with pytest.raises(InvalidField) as refused:
            asked(at(nested(levels)))
        assert str(refused.value.field) == place.partition(" of ")[0]


@pytest.mark.parametrize("said", ['{"a": "\\ud800"}', '{"\\ud800": 1}', '{"a": NaN}', "[1]", "{",
                                  '{"a": -Infinity}', f'{{"a": {"1" * 5000}}}'])  # fmt: skip
@pytest.mark.parametrize("place", [place for place in PLACES if place.endswith("arguments")])
def test_arguments_that_json_cannot_hold_are_refused_by_their_field(place: str, said: str) -> None:
    asked, at = PLACES[place]
    body = json.loads(json.dumps(at({"a": "HERE"})).replace(json.dumps(json.dumps({"a": "HERE"})), json.dumps(said)))
    with pytest.raises(InvalidField, match="a JSON object, as a text") as refused:
        asked(body)
    assert refused.value.field == place


@pytest.mark.parametrize(("more", "field"), [
    ({"properties": [1]}, "tools[0].parameters.properties"), ({"properties": "x"}, "tools[0].parameters.properties"),
    ({"required": 5}, "tools[0].parameters.required"), ({"required": [5]}, "tools[0].parameters.required"),
])  # fmt: skip
def test_parameters_are_the_schema_of_an_object_whether_a_call_is_forced_or_not(
    more: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidField) as refused:
        chat({"tools": [{"type": "function", "function": {"name": "f", "parameters": more}}]})
    assert refused.value.field == field
