"""What agents ask for, by the official clients against a real server: constrained texts, tools, Anthropic's protocol.

The model is tiny and random. Constrained decoding makes even that write valid JSON and valid calls.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.conformance.server import Server
from tests.gateway.openai.chatting import chat_model

QUESTION: list[Any] = [{"role": "user", "content": "what is it?"}]


class Paint(pydantic.BaseModel):
    """Strict in pydantic's words; the openai client makes the schema of it."""

    color: Literal["red", "green"]
    layers: int = pydantic.Field(ge=0, le=9)
    glossy: bool | None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "base" / "tiny", context=4096)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0) as client:
        yield client


def test_a_text_is_parsed_into_the_clients_own_type(client: openai.OpenAI, model: Path) -> None:
    reply = client.chat.completions.parse(
        model=str(model), messages=QUESTION, response_format=Paint, n=3, seed=1, logprobs=True
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Paint)
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert choice.logprobs.content[0].logprob == 0  # nothing but the brace may come first


def test_a_stream_of_json_is_the_whole_answer(client: openai.OpenAI, model: Path) -> None:
    asked: Any = {"model": str(model), "messages": QUESTION, "seed": 7, "response_format": {
        "type": "json_schema", "json_schema": {"name": "paint", "strict": True, "schema": Paint.model_json_schema()},
    }}  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stream: Any = client.chat.completions.create(**asked, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole
    Paint.model_validate_json(streamed)


def test_any_json_object_and_a_text_cut_by_its_length(client: openai.OpenAI, model: Path) -> None:
    asked: Any = {"model": str(model), "messages": QUESTION, "response_format": {"type": "json_object"}}
    cut = client.chat.completions.create(**asked, seed=1, max_tokens=2).choices[0]
    assert cut.finish_reason == "length"
    assert (cut.message.content or "").startswith("{")
    texts = client.chat.completions.create(**asked, n=16, max_tokens=400).choices
    whole = [json.loads(choice.message.content or "") for choice in texts if choice.finish_reason == "stop"]
    assert whole
    assert all(isinstance(each, dict) for each in whole)


def test_a_schema_that_is_not_supported_is_refused_before_anything_starts(client: openai.OpenAI, model: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    asked: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=str(model), messages=QUESTION, response_format=asked)
    assert refused.value.param == "response_format"
    assert "Unimplemented keys" in refused.value.message


WEATHER: Any = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city.", "parameters": {
        "type": "object", "required": ["city", "days"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
}}  # fmt: skip
STOP: Any = {"type": "function", "function": {"name": "stop"}}


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_one_of_the_tools(client: openai.OpenAI, model: Path, choice: Any) -> None:
    asked: Any = {"model": str(model), "messages": QUESTION, "tools": [WEATHER, STOP], "tool_choice": choice}
    reply = client.chat.completions.create(**asked, n=4, seed=2, max_tokens=400)
    for each in reply.choices:
        assert each.finish_reason == "tool_calls"
        assert each.message.content is None
        calls = calls_of(each.message)
        assert calls
        assert choice == "required" or len(calls) == 1
        for name, arguments in calls:
            assert name == "get_weather" or choice == "required"
            assert arguments == {} or (arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 9)
    single = client.chat.completions.create(**asked, n=4, seed=2, max_tokens=400, parallel_tool_calls=False)
    assert [len(calls_of(each.message)) for each in single.choices] == [1] * 4


def test_a_streamed_call_is_what_the_client_puts_together(client: openai.OpenAI, model: Path) -> None:
    asked: Any = {
        "model": str(model), "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required", "seed": 5,
        "max_tokens": 400,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert calls_of(streamed.message) == calls_of(whole.message) != []
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    chunks: Any = client.chat.completions.create(**asked, stream=True)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [delta.index for delta in deltas] == list(range(len(deltas)))
    assert all(delta.id.startswith("call_") for delta in deltas)


def test_a_conversation_goes_on_with_what_a_tool_returned(client: openai.OpenAI, model: Path) -> None:
    asked: Any = {"model": str(model), "tools": [WEATHER], "max_tokens": 400, "seed": 1}
    first = client.chat.completions.create(**asked, messages=QUESTION, tool_choice="required").choices[0].message
    assert first.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12 degrees"} for call in first.tool_calls]
    told: Any = [*QUESTION, first.model_dump(exclude_none=True), *results]
    short = asked | {"max_tokens": 5}
    assert client.chat.completions.create(**short, messages=told).choices[0].finish_reason in ("length", "stop")
    without = client.chat.completions.create(**short, messages=told, tool_choice="none").usage
    with_tools = client.chat.completions.create(**short, messages=told).usage
    assert without is not None
    assert with_tools is not None
    assert with_tools.prompt_tokens > without.prompt_tokens, "the tools are described to the model, or not"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [STOP], "tool_choice": {"type": "function", "function": {"name": "go"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [STOP], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
          "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "a", "arguments": "[]"}},
        ]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_are_refused_by_their_field(
    client: openai.OpenAI, model: Path, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", cast_to=object, body={"model": str(model), "messages": QUESTION} | asked)
    assert refused.value.param == param
