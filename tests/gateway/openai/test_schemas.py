"""Every parameter is honoured, or refused by its name."""

from typing import Any

import msgspec
import pytest

from gateway.openai import schemas
from knapper import limits
from knapper.errors import InvalidField
from knapper.wire.types import SamplingParams

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**more: Any) -> schemas.ChatRequest:
    return schemas.decode(msgspec.json.encode(CHAT | more), schemas.ChatRequest)


def completion(**more: Any) -> schemas.CompletionRequest:
    return schemas.decode(msgspec.json.encode(COMPLETION | more), schemas.CompletionRequest)


def test_parameters_become_those_of_a_sample() -> None:
    parameters = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7, "stop": ["a", "b"], "ignore_eos": True}
    meant = SamplingParams(
        max_tokens=3, seed=7, stop_strings=("a", "b"), ignore_eos=True, temperature=0.5, top_k=5, top_p=0.9
    )
    assert chat(max_completion_tokens=3, **parameters).sampling() == meant
    assert chat(max_tokens=3, **parameters).sampling() == meant
    assert completion(max_tokens=3, **parameters).sampling() == meant
    assert chat(stop="a").stops == ("a",)


def test_what_is_left_out_or_null_is_openais_default() -> None:
    nothing = dict.fromkeys(
        ("n", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "max_tokens", "logit_bias")
    )
    assert chat(**nothing).sampling() == chat().sampling() == SamplingParams()
    assert completion(**nothing).sampling() == completion().sampling() == SamplingParams(max_tokens=16)
    assert chat(**nothing).choices == 1
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "someone", "store": False}
    assert (
        chat(**neutral, response_format={"type": "text"}, tools=[], tool_choice="none").sampling() == SamplingParams()
    )
    assert completion(**neutral, suffix="", best_of=1).sampling() == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 1), ("repetition_penalty", 1.0), ("length_penalty", 1.0), ("min_p", 0), ("min_p", 0.0),
        ("min_tokens", 0), ("use_beam_search", False), ("skip_special_tokens", True),
        ("include_stop_str_in_output", False), ("prompt_cache_key", "k"), ("prompt_cache_retention", "24h"),
        ("safety_identifier", "me"), ("user", "me"),
    ],
)  # fmt: skip
def test_values_that_ask_for_nothing_are_taken(field: str, value: Any) -> None:
    """Also null, which clients send for what was not set."""
    for neutral in (value, None):
        assert chat(**{field: neutral}).sampling() == SamplingParams()
        assert completion(**{field: neutral}).sampling() == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", "none"), ("verbosity", "low"), ("verbosity", "medium"), ("verbosity", "high"),
        ("tool_choice", "auto"), ("function_call", "auto"), ("parallel_tool_calls", True),
        ("add_generation_prompt", True), ("continue_final_message", False), ("modalities", ["text"]),
    ],
)  # fmt: skip
def test_values_that_ask_a_chat_for_nothing_are_taken(field: str, value: Any) -> None:
    for neutral in (value, None):
        assert chat(**{field: neutral}).sampling() == SamplingParams()


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-12, 1e-8, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert chat(temperature=temperature).sampling().temperature == 0
    assert completion(temperature=temperature).sampling().temperature == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.1), ("frequency_penalty", -1), ("logit_bias", {"5": 1}), ("store", True),
        ("repetition_penalty", 1.1), ("length_penalty", 2), ("min_p", 0.05), ("min_tokens", 3),
        ("use_beam_search", True), ("skip_special_tokens", False), ("include_stop_str_in_output", True),
        ("safety_identifier", 5),
        ("metadata", {"a": "b"}), ("service_tier", "flex"), ("temperature", -1), ("top_p", 0), ("top_k", 0), ("n", 0),
        ("n", limits.num_samples_max + 1), ("seed", 2**63), ("stop", ""), ("stop", ["a", ""]),
        ("stop", ["a"] * (limits.stop_sequences_max + 1)), ("stream_options", {"include_usage": True}), ("made_up", 1),
        ("model", ""),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    for ask in (chat, completion):
        with pytest.raises(InvalidField) as refused:
            ask(**{field: value}).sampling()
        assert refused.value.field is not None
        assert refused.value.field.startswith(field)
        assert "allowed:" in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("verbosity", "chatty"), ("continue_final_message", True),
        ("functions", [{}]), ("function_call", {"name": "f"}), ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}), ("reasoning_effort", "low"), ("max_tokens", 0),
        ("max_completion_tokens", 0), ("top_logprobs", 2), ("top_logprobs", limits.top_logprobs_max + 1),
        ("messages", []), ("logprobs", 3),
    ],
)  # fmt: skip
def test_what_chats_do_not_have_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(**{field: value}).sampling()
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"type": "grammar"}, "type"), ({"type": "json_schema"}, "json_schema.schema"), ({}, "type"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "", "schema": {}}}, "json_schema.name"),
        ({"type": "json_object", "json_schema": {"name": "n", "schema": {}}}, "json_schema"),
        ({"type": "json_object", "schema": {}}, "schema"),
    ],
)  # fmt: skip
def test_a_response_format_that_says_nothing_or_too_much_is_refused(value: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(response_format=value).answer()
    assert refused.value.field == f"response_format.{field}"


def test_a_constrained_text_ends_where_its_grammar_does() -> None:
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}}
    part = chat(**asked).answer()
    assert part is not None
    assert part["json_schema"]["type"] == "object"
    assert chat(response_format={"type": "text"}).answer() is chat().answer() is None
    with pytest.raises(InvalidField, match="ignore_eos is True"):
        chat(**asked, ignore_eos=True).answer()


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of"), ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": limits.top_logprobs_max + 1}, "logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "logprobs"),
        ({"prompt": [1, -1]}, "prompt[1]"),
    ],
)  # fmt: skip
def test_what_completions_do_not_have_is_refused_by_name(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        completion(**asked).sampling()
    assert refused.value.field in (field, field.replace("[1]", "[...]"))


def test_a_prompt_is_a_text_or_tokens_or_several() -> None:
    assert completion(prompt="a").prompts() == ["a"]
    assert completion(prompt=["a", "b"]).prompts() == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts() == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts() == [[1], [2, 3]]
    wrongs: list[Any] = ["", [], [""], [[]], [1, "a"], ["a", []]]
    for wrong in wrongs:
        with pytest.raises(InvalidField, match="prompt is"):
            completion(prompt=wrong).prompts()


def test_choices_have_a_limit_over_all_prompts() -> None:
    half = limits.num_samples_max // 2
    assert len(completion(prompt=["a", "b"], n=half).prompts()) == 2
    with pytest.raises(InvalidField, match="prompt: count times n"):
        completion(prompt=["a", "b"], n=half + 1).prompts()


def test_a_chat_has_at_most_so_many_messages() -> None:
    longest = [{"role": "user", "content": "x"}] * limits.chat_messages_max
    assert len(chat(messages=longest).conversation()) == limits.chat_messages_max
    with pytest.raises(InvalidField, match="messages is"):
        chat(messages=[*longest, longest[0]])


def test_messages_are_texts_whole_or_in_parts() -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "end"}]
    request = chat(messages=[{"role": "system", "content": parts, "name": "me"}, {"role": "user", "content": ""}])
    assert request.conversation() == [
        {"role": "system", "content": "the end", "name": "me"},
        {"role": "user", "content": ""},
    ]
    answered = {
        "role": "assistant", "content": "x", "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    assert chat(messages=[answered]).conversation() == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0].image_url.url"),
        ({"content": [{"type": "image_url"}]}, "messages[0].content[0].image_url"),
        ({"content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
        ({"content": None}, "messages[0].content"),
        ({"content": "x", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_messages_that_are_no_texts_are_refused_by_name(message: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(messages=[{"role": "user"} | message]).conversation()
    assert refused.value.field == field


def test_a_length_may_be_given_once() -> None:
    assert chat(max_tokens=4, max_completion_tokens=4).sampling().max_tokens == 4
    with pytest.raises(InvalidField, match="max_tokens is 4"):
        chat(max_tokens=4, max_completion_tokens=5).sampling()
