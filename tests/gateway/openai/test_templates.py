"""Chat templates render as transformers renders them, and can do no harm."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from knapper.catalogue.chat_templates import Template
from knapper.catalogue.tokenizer import Language
from knapper.errors import InvalidField, UserError
from tests.gateway.openai.chatting import TEMPLATE, chat_model

CHAT = [
    {"role": "system", "content": "Answer <briefly> & well."},
    {"role": "user", "content": 'the "naïve" 漢字'},
    {"role": "assistant", "content": "and"},
    {"role": "user", "content": "  the end \n"},
]
TEMPLATES = {
    "plain": TEMPLATE,
    "whitespace, namespaces and loop controls": """
{%- set seen = namespace(last='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index0 > 2 %}{% break %}{% endif %}
    {%- set seen.last = message['content'] | trim %}
    <{{ message.role | upper }}>{{ seen.last }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<ASSISTANT>' }}{% endif %}""",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ tools is none }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "not given": "{% if documents %}documents{% endif %}{% if thinking is defined %}thinks{% endif %}{{ nothing }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_tokens_that_transformers_gives_it(tmp_path: Path, name: str) -> None:
    directory = chat_model(tmp_path / "m", TEMPLATES[name])
    reference: Any = AutoTokenizer.from_pretrained(str(directory))
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert Language.read(directory).chat(CHAT, 0.0, {}) == expected
    assert len(expected) > 0 or name == "not given"


def test_the_file_of_its_own_wins_and_a_list_has_a_default(tmp_path: Path) -> None:
    directory = chat_model(tmp_path / "m")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "the"}]
    config |= {"chat_template": named, "eos_token": {"content": "<|end|>", "lstrip": False}}
    path.write_text(json.dumps(config))
    decode = Language.read(directory).tokenizer.decode
    assert decode(Language.read(directory).chat(CHAT, 0.0, {})) == "the"
    (directory / "chat_template.jinja").write_text("and{{ eos_token }}")
    assert decode(Language.read(directory).chat(CHAT, 0.0, {}), skip_special_tokens=False) == "and<|end|>"


def test_a_template_may_lie_in_a_file_of_the_images(tmp_path: Path) -> None:
    """Of a checkpoint with images; the tokenizer's own is what a client applies."""
    directory = chat_model(tmp_path / "m")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "the"}))
    for own, expected in (({"chat_template": "and"}, "and"), ({}, "the")):
        path.write_text(json.dumps({name: config[name] for name in config.keys() - {"chat_template"}} | own))
        language = Language.read(directory)
        assert language.tokenizer.decode(language.chat(CHAT, 0.0, {})) == expected


def test_variables_of_the_client_reach_the_template_and_replace_nothing() -> None:
    template = Template("{{ 'thinks' if enable_thinking else 'acts' }}", {"bos_token": "<s>"})
    assert template.render([], 0.0, {"enable_thinking": True}) == "thinks"
    assert template.render([], 0.0, {"enable_thinking": False}) == "acts"
    for name in ("messages", "add_generation_prompt", "bos_token"):
        with pytest.raises(InvalidField, match="chat_template_kwargs"):
            template.render([], 0.0, {name: "mine"})


def test_the_clock_of_a_template_is_the_gateways() -> None:
    now = time.mktime((2024, 7, 26, 12, 0, 0, 0, 0, -1))
    assert Template("{{ strftime_now('%d %b %Y') }}", {}).render([], now, {}) == "26 Jul 2024"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'secrets' %}",
    ],
)
def test_what_a_template_may_not_or_cannot_do_is_an_error_of_the_request(source: str) -> None:
    chat = [dict(message) for message in CHAT]
    with pytest.raises(UserError, match="chat template"):
        Template(source, {}).render(chat, 0.0, {})
    assert chat == CHAT


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"chat_template is '\{% if %\}'"):
        Template("{% if %}", {})


def test_a_model_without_a_template_has_no_chat(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template.*v1/completions"):
        Language.read(chat_model(tmp_path / "m", None)).chat(CHAT, 0.0, {})


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"tokenizer\.json"):
        Language.read(tmp_path)
