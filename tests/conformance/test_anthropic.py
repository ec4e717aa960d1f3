"""The official Anthropic client against a real server whose model is tiny and random: grammars make it call tools."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.conformance.server import Server
from tests.gateway.openai.chatting import chat_model

QUESTION: Any = [{"role": "user", "content": "what is it?"}]
SCHEMA: Any = {
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}  # fmt: skip
TOOLS: Any = [
    {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA},
    {"name": "stop", "input_schema": {"type": "object"}},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "base" / "tiny", context=4096)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="tml-local", max_retries=0) as client:
        yield client


def asked(model: Path | str, temperature: float = 0, **more: Any) -> Any:
    """The client has no argument for the temperature; the protocol does."""
    fields = {"model": str(model), "max_tokens": 400, "messages": QUESTION, "extra_body": {"temperature": temperature}}
    return fields | more


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    return str(block.text)


def test_a_message_and_its_stream_say_the_same(client: anthropic.Anthropic, model: Path) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    whole = client.messages.create(**asked(model, max_tokens=12, system=system))
    assert whole.stop_reason == "max_tokens"
    assert [block.type for block in whole.content] == ["text"]
    assert whole.usage.output_tokens == 12
    with client.messages.stream(**asked(model, max_tokens=12, system=system)) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == text_of(streamed) == text_of(whole)
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("max_tokens", 12)
    count = client.messages.count_tokens(model=str(model), messages=QUESTION, system=system)
    assert count.input_tokens == whole.usage.input_tokens == streamed.usage.input_tokens


def test_a_stop_sequence_is_named_and_no_part_of_the_text(client: anthropic.Anthropic, model: Path) -> None:
    text = text_of(client.messages.create(**asked(model, max_tokens=12)))
    stop = text[3:5]
    ended = client.messages.create(**asked(model, max_tokens=12, stop_sequences=["no such", stop]))
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", stop)
    assert text_of(ended) == text[: text.index(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_tool_is_used_and_its_result_comes_back(
    client: anthropic.Anthropic, model: Path, choice: dict[str, Any]
) -> None:
    call = asked(model, tools=TOOLS, tool_choice=choice | {"disable_parallel_tool_use": True}, temperature=1)
    message = client.messages.create(**call)
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.id.startswith("toolu_")
    assert block.name == "get_weather" or choice["type"] == "any"
    assert block.name == "stop" or block.input["city"] in ("Oslo", "Rome")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "12"}]}
    turns = [*QUESTION, message.to_param(), {"role": "user", "content": [result, {"type": "text", "text": "so?"}]}]
    assert client.messages.create(**asked(model, messages=turns, tools=TOOLS, max_tokens=4)).usage.output_tokens <= 4


def test_a_streamed_tool_is_what_the_client_puts_together(client: anthropic.Anthropic, model: Path) -> None:
    with client.messages.stream(**asked(model, tools=TOOLS, tool_choice={"type": "any"})) as stream:
        events = list(stream)
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    for block in message.content:
        assert block.type == "tool_use"
        assert block.input == {} or block.input["city"] in ("Oslo", "Rome")
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(message.content)


def test_a_message_follows_the_schema_of_output_config(client: anthropic.Anthropic, model: Path) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = client.messages.create(**asked(model, output_config=config))
    assert json.loads(text_of(message))["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"made_up": 1}, "made_up"), ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"max_tokens": 0}, "max_tokens"), ({"top_k": 0}, "top_k"), ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "go"}}, "tool_choice"),
        ({"tools": [{"name": "a", "input_schema": {"not": {}}}], "tool_choice": {"type": "any"}}, "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field(
    client: anthropic.Anthropic, model: Path, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        body = {"model": str(model), "max_tokens": 4, "messages": QUESTION} | more
        client.post("/v1/messages", cast_to=object, body=body)
    told: Any = refused.value.body
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert told["error"]["param"] == param


def test_the_program_of_the_documentation_runs(server: Server, model: Path) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "openai.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(import anthropic.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert block
    program = block[1]
    for said, meant in (("http://127.0.0.1:8000", server.url), ("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))):
        assert said in program
        program = program.replace(said, meant)
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert printed.returncode == 0, printed.stderr.decode()
    assert printed.stdout.strip()


def test_errors_are_those_that_the_client_knows(client: anthropic.Anthropic, model: Path, server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**asked("no/such"))
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(**asked(model, messages=[{"role": "user", "content": "x" * 5000}]))
    keyless = httpx.post(f"{server.url}/v1/messages", json={"model": str(model)})
    assert (keyless.status_code, keyless.json()["error"]["type"]) == (401, "authentication_error")
