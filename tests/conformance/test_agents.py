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
    return chat_model(tmp_path_factory.mktemp("models") / "base" / "tiny")


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
