"""OpenAI's client of the Responses protocol against a real server whose model is tiny and random."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.conformance.server import Server
from tests.gateway.openai.chatting import chat_model

WEATHER: Any = {
    "type": "function", "name": "get_weather", "description": "The weather.", "strict": True, "parameters": {
        "type": "object", "required": ["city"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    },
}  # fmt: skip


class Verdict(pydantic.BaseModel):
    good: bool
    kind: Literal["a", "b"]


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


def asked(model: Path, **more: Any) -> Any:
    return {"model": str(model), "input": "what is it?", "temperature": 0, "max_output_tokens": 400} | more


def test_a_response_and_its_stream_say_the_same(client: openai.OpenAI, model: Path) -> None:
    whole = client.responses.create(**asked(model, max_output_tokens=9, instructions="Be brief."))
    assert whole.output_text
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 9
    with client.responses.stream(**asked(model, max_output_tokens=9, instructions="Be brief.")) as stream:
        events = list(stream)
    streamed = events[-1]
    assert streamed.type == "response.incomplete"
    assert streamed.response.output_text == whole.output_text
    assert streamed.response.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


def test_a_text_is_parsed_into_the_clients_own_type(client: openai.OpenAI, model: Path) -> None:
    response = client.responses.parse(**asked(model, text_format=Verdict))
    assert response.status == "completed"
    assert isinstance(response.output_parsed, Verdict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_output_comes_back(client: openai.OpenAI, model: Path, stream: bool) -> None:
    call = asked(model, tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"})
    if stream:
        with client.responses.stream(**call) as events:
            response: Any = events.get_final_response()
    else:
        response = client.responses.create(**call)
    assert response.status == "completed"
    (item,) = response.output
    assert item.type == "function_call"
    assert json.loads(item.arguments)["city"] in ("Oslo", "Rome")
    told = [
        {"role": "user", "content": "what is it?"},
        item.model_dump(include={"type", "call_id", "name", "arguments", "id"}),
        {"type": "function_call_output", "call_id": item.call_id, "output": "12"},
    ]  # fmt: skip
    again = client.responses.create(**asked(model, input=told, tools=[WEATHER], max_output_tokens=3))
    assert again.usage is not None
    assert again.usage.input_tokens > response.usage.input_tokens


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"store": True}, "store"), ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"), ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"), ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]},
         "input[0].arguments"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}}, "text.format"),
        ({"input": "x" * 5000}, "input"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field(
    client: openai.OpenAI, model: Path, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/responses", cast_to=object, body=asked(model) | more)
    assert refused.value.param == param
