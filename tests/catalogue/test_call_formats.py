"""Calls of tools: each family's format is read off its template, forced on a random model, and found in a text."""

import json
from types import SimpleNamespace
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from knapper.catalogue.call_formats import (
    CallFormat,
    Hermes,
    Llama,
    Mistral,
    MistralArguments,
    QwenCoder,
    of_template,
)
from knapper.catalogue.call_reader import CallReader
from knapper.catalogue.tools import Tool, ToolCall
from knapper.engine.sampling.grammar import GrammarCompiler
from knapper.errors import InvalidField
from knapper.wire import grammars
from tests.engine.tiny import eos, tiny_model

WEATHER = Tool("get_weather", "the weather", {
    "type": "object", "properties": {
        "city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    }, "required": ["city", "days"], "additionalProperties": False,
})  # fmt: skip
STOP = Tool("stop", "", {})
TOOLS = {tool.name: tool for tool in (WEATHER, STOP)}
FORMATS: list[CallFormat] = [Hermes(), QwenCoder(), Mistral(), MistralArguments(), Llama()]
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tiny_model(tmp_path_factory.mktemp("tiny"))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def marked(plain: Tokenizer) -> Tokenizer:
    """With the markers as tokens of their own, as families have them: Qwen's are no special tokens, Mistral's are."""
    tokenizer = Tokenizer.from_str(plain.to_str())
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKERS[:2]])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in MARKERS[2:]])
    return tokenizer


def drawn(grammar: str, tokenizer: Tokenizer, form: CallFormat, seed: int) -> str:
    """A text of a model that finds every token equally likely, as a client's detokenizer shows it."""
    end = tokenizer.token_to_id(eos)
    facts: Any = SimpleNamespace(vocab_size=tokenizer.get_vocab_size(), eos=(end,))
    state, rng, tokens = GrammarCompiler(tokenizer, facts).compile(grammar).start(), np.random.default_rng(seed), []
    shown = form.special_tokens(tokenizer)
    while (token := int(rng.choice(np.flatnonzero(state.allowed_V())))) != end:
        state.take(token)
        tokens.append(token)
        assert len(tokens) < 4000
    pieces, run = [], list[int]()
    for token in [*tokens, -1]:
        if token in shown or token < 0:
            pieces += [tokenizer.decode(run), shown.get(token, "")]
            run = []
        else:
            run.append(token)
    return "".join(pieces)


def read(form: CallFormat, text: str, size: int = 1, several: bool = True) -> list[str | ToolCall]:
    """The pieces of a text that comes `size` characters at a time; neighbouring texts are one."""
    reader = CallReader(form, TOOLS, several)
    pieces = [piece for at in range(0, len(text), size) for piece in reader.add(text[at : at + size])] + reader.end()
    joined: list[str | ToolCall] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize("tokens", ["plain", "marked"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_a_forced_call_is_one_of_the_tools_with_arguments_of_its_schema(
    form: CallFormat, tokens: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(tokens)
    grammar = form.grammar([WEATHER, STOP], True, tokenizer)
    grammars.expect_compilable(grammar, "tools")
    names = set()
    for seed in range(6):
        calls = read(form, drawn(grammar, tokenizer, form, seed))
        assert calls
        for call in calls:
            assert isinstance(call, ToolCall), calls
            arguments = json.loads(call.arguments)
            jsonschema.validate(arguments, {"type": "object", **TOOLS[call.name].parameters})
            names.add(call.name)
    assert names == set(TOOLS)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_one_call_is_one(form: CallFormat, plain: Tokenizer) -> None:
    grammar = form.grammar([WEATHER, STOP], False, plain)
    assert all(len(read(form, drawn(grammar, plain, form, seed))) == 1 for seed in range(4))


def test_a_marker_that_is_a_token_is_drawn_as_that_token(marked: Tokenizer) -> None:
    """Spelled out it would be another text to the model than the one it was taught."""
    grammar = Hermes().grammar([STOP], False, marked)
    facts: Any = SimpleNamespace(vocab_size=marked.get_vocab_size(), eos=(marked.token_to_id(eos),))
    state = GrammarCompiler(marked, facts).compile(grammar).start()
    assert np.flatnonzero(state.allowed_V()).tolist() == [marked.token_to_id("<tool_call>")]


CITY = ToolCall("get_weather", '{"city": "Oslo", "days": 2}')
WRITTEN = [
    (Hermes(), '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'),
    (QwenCoder(), ("<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n"
     "</parameter>\n</function>\n</tool_call>")),
    (Mistral(), '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}]'),
    (MistralArguments(), '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 2}'),
    (Llama(), '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}'),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text"), WRITTEN, ids=[type(form).__name__ for form, _ in WRITTEN])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_in_a_text_however_it_is_cut(form: CallFormat, text: str, size: int) -> None:
    assert read(form, text, size) == [CITY]
    if not form.at_start_only:
        assert read(form, f"  I look. \n\n{text}", size) == ["  I look.", CITY]
        assert read(form, "a < b <tool [TOOL ", size) == ["a < b <tool [TOOL "]
    assert read(form, "Nothing to call {} here.", size) == ["Nothing to call {} here."]


ODD = ['{"city": "\\ud83d"}', '{"\\udc00": 1}', '{"city": NaN}', '{"days": -Infinity}',
       f'{{"days": {"1" * 5000}}}', f'{{"city": {"[" * 200}{"]" * 200}}}', f'{{"city": {"[" * 9000}']  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:16])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_arguments_that_json_cannot_hold_are_no_call(form: CallFormat, odd: str) -> None:
    """A client would not be able to read them, nor the server to send them."""
    text = {type(each): written.replace('{"city": "Oslo", "days": 2}', odd) for each, written in WRITTEN}[type(form)]
    text = text.replace("\n2\n", f"\n{odd}\n")  # where each argument is written alone: one that is a text, then
    alone = ToolCall("get_weather", json.dumps({"city": "Oslo", "days": odd}))
    assert read(form, text, 1000) == [alone if isinstance(form, QwenCoder) else text]


@pytest.mark.parametrize(
    ("written", "meant"), [("1e999", 10**309), ("-9810E3531831723105", -(10**309)), ("1e308", 1e308)]
)
def test_a_number_that_no_double_holds_stays_json(written: str, meant: float) -> None:
    """A grammar of JSON draws such numbers too."""
    for form, text in WRITTEN:
        (call,) = read(form, text.replace("2", written), 1000)
        assert isinstance(call, ToolCall)
        assert msgspec.json.decode(call.arguments) == {"city": "Oslo", "days": meant}


@pytest.mark.parametrize("name", ['["get_weather"]', "{}", "1", "null", "true", "1e999", '"\\ud800"'])
def test_a_call_of_what_is_no_name_is_none(name: str) -> None:
    for form, written in WRITTEN:
        if '"get_weather"' in written:
            text = written.replace('"get_weather"', name)
            assert read(form, text, 1000) == [text]


@pytest.mark.parametrize("size", [1, 7])
def test_several_calls_and_what_is_none(size: int) -> None:
    _, text = WRITTEN[0]
    assert read(Hermes(), f"{text}\n{text}", size) == [CITY, CITY]
    assert read(Hermes(), f"{text}\n and {text}", size, several=False) == [CITY]
    assert read(Hermes(), f"{text} so.", size) == [CITY, " so."]
    for broken in ('<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>', "<tool_call>{</tool_call>",
                   '<tool_call>\n{"name": "stop", "arguments": [1]}\n</tool_call>', "<tool_call>"):  # fmt: skip
        assert read(Hermes(), f"I say {broken}", size) == [f"I say {broken}"]
    unclosed = text.removesuffix("\n</tool_call>")
    assert read(Hermes(), unclosed, size) == [CITY]
    assert read(Hermes(), unclosed[:-4], size) == [unclosed[:-4]]
    two = f"[TOOL_CALLS]stop[ARGS]{{}}{WRITTEN[3][1]}"
    assert read(MistralArguments(), two, size) == [ToolCall("stop", "{}"), CITY]


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ('{{ tools }}<tool_call>\n{"name": ', Hermes), ("<function=a><parameter=b>", QwenCoder),
        ("[TOOL_CALLS] [", Mistral), ("[TOOL_CALLS]a[ARGS]", MistralArguments),
        ('{{ "<|python_tag|>" }}{"name": x, "parameters": y}', Llama),
    ],
)  # fmt: skip
def test_the_format_is_read_off_the_template(source: str, form: type[CallFormat]) -> None:
    assert type(of_template(source)) is form


def test_a_template_of_another_form_is_refused() -> None:
    for source in ("{{ tools }}", "<tool_call>f<arg_key>a</arg_key>"):
        with pytest.raises(InvalidField, match="calls in a form that is not read here"):
            of_template(source)


def test_an_answer_in_words_may_follow_a_schema_of_its_own(plain: Tokenizer) -> None:
    answer = grammars.json_part(
        {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}, "f"
    )
    grammar = Hermes().grammar([STOP], True, plain, answer)
    grammars.expect_compilable(grammar, "tools")
    texts = [read(Hermes(), drawn(grammar, plain, Hermes(), seed)) for seed in range(20)]
    words = [text[0] for text in texts if isinstance(text[0], str)]
    assert 0 < len(words) < 20
    assert all(json.loads(word) == {"n": 1} for word in words)
    with pytest.raises(InvalidField, match="calls are JSON too"):
        Llama().grammar([STOP], True, plain, answer)
