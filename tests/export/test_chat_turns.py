"""What Jinja makes of a conversation, Ollama's template makes too, or none is written."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from knapper.catalogue.chat_templates import Template
from knapper.catalogue.conversations import Message as Said
from knapper.export import ollama
from knapper.export.chat_turns import Message, Turns, turns
from tests.engine.tiny import tiny_model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULTED = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
THOUGHTS = (  # which answers are shown depends on where they stand
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)
CONVERSATIONS = [
    ["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"],
    ["user", "assistant"] * 4 + ["user"],
]  # fmt: skip


def rendered(source: str) -> Callable[[Sequence[Message], bool], str]:
    template = Template(source, {"bos_token": "<s>", "eos_token": "</s>"})

    def render(messages: Sequence[Message], answering: bool) -> str:
        said: Sequence[Said] = messages
        return template.render(said, 0.0, {}, answering=answering)

    return render


@pytest.mark.parametrize("source", [CHATML, DEFAULTED, GEMMA, MISTRAL], ids=["chatml", "default", "gemma", "mistral"])
def test_turns_render_what_the_template_renders(source: str) -> None:
    render = rendered(source)
    found = turns(render, "<s>")
    assert found is not None
    for roles in CONVERSATIONS:
        if source == MISTRAL and "system" in roles:
            continue
        messages = [{"role": role, "content": f"Word {n}, {{{{ .Content }}}}"} for n, role in enumerate(roles)]
        assert found.render(messages) == render(messages, True).removeprefix("<s>")


def test_a_template_that_is_more_than_turns_has_no_equivalent() -> None:
    assert turns(rendered(THOUGHTS)) is None
    assert turns(rendered("{{ messages | length }}")) is None


@pytest.mark.parametrize(
    ("source", "template"),
    [
        (DEFAULTED, (
            "{{ if not .System }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}{{ range .Messages }}"
            '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
            '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
            '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
            "{{ end }}{{ end }}<|im_start|>assistant\n"
        )),
        (GEMMA, (
            '{{ $folded := false }}{{ range .Messages }}'
            '{{ if eq .Role "system" }}<start_of_turn>user\n{{ .Content }}\n\n'
            '{{ $folded = true }}{{ else if eq .Role "user" }}{{ if not $folded }}<start_of_turn>user\n{{ end }}'
            "{{ $folded = false }}{{ .Content }}<end_of_turn>\n"
            '{{ else if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n'
            "{{ end }}{{ end }}<start_of_turn>model\n"
        )),
    ],
    ids=["default", "gemma"],
)  # fmt: skip
def test_turns_are_written_in_gos_language(source: str, template: str) -> None:
    found = turns(rendered(source), "<s>")
    assert found is not None
    assert found.template() == template


def test_braces_of_a_template_are_text_in_gos() -> None:
    found = Turns({"user": ("{{a}}", "")}, "", "")
    assert (
        found.template() == '{{ range .Messages }}{{ if eq .Role "user" }}{{ "{{" }}a}}{{ .Content }}{{ end }}{{ end }}'
    )


def test_a_modelfile_has_the_template_and_what_ends_an_answer(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    write = partial((model / "chat_template.jinja").write_text, encoding="utf-8")
    gguf = tmp_path / "mine-q8_0.gguf"
    write(CHATML)
    text, templated = ollama.modelfile(model, gguf)
    assert templated
    assert text.startswith('FROM ./mine-q8_0.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\n')
    for other in (THOUGHTS, "{{ strftime_now('%d %b %Y') }}" + CHATML, '"""' + CHATML):
        write(other)
        assert ollama.modelfile(model, gguf) == ("FROM ./mine-q8_0.gguf\n", False)
