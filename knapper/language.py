"""What a model's directory says about text: its tokenizer, its special tokens, its chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from knapper.errors import InvalidField, UserError
from knapper.templates import Message, Template


@dataclass(frozen=True)
class Language:
    """Text to tokens and back. Tokenizers are fast, but not free: encode off the event loop."""

    tokenizer: Tokenizer
    template: Template | None
    end: int | None = None  # the token that ends a text

    @staticmethod
    def read(directory: Path) -> "Language":
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises InvalidField."""
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            config = _json(directory / "tokenizer_config.json")
            more = _json(directory / "special_tokens_map.json")
        except Exception as error:  # tokenizers raises nothing more specific
            allowed = "one whose tokenizer.json and tokenizer_config.json can be read here"
            raise InvalidField("model: directory", str(directory), allowed, str(error)) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        alone = directory / "chat_template.jinja"
        source = alone.read_text(encoding="utf-8") if alone.is_file() else _chosen(config.get("chat_template"))
        special = _special_tokens(more | config)
        template = None if source is None else Template(source, special)
        end = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
        return Language(tokenizer, template, end)

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts around any text."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def chat(self, messages: Sequence[Message], now: float, more: Mapping[str, object]) -> list[int]:
        """The prompt for the assistant's next words, from the model's template. Raises UserError."""
        prompt = self.render(messages, now, more)
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return ids

    def render(
        self, messages: Sequence[Message], now: float, more: Mapping[str, object], *, answering: bool = True
    ) -> str:
        """The messages as the model's template writes them; `answering`: up to the assistant's next words.

        Raises UserError.
        """
        if self.template is None:
            raise UserError(
                "the model has no chat template, as base models do not; allowed: a prompt that is plain text "
                "(v1/completions), or put a chat_template.jinja into the model's directory and start knapper again"
            )
        return self.template.render(messages, now, more, answering=answering)

    def word(self, token: int) -> str:
        """What one token stands for inside a text; U+FFFD where that is no whole character.

        Decoded behind itself: some tokenizers drop a space that begins a text.
        """
        decode = self.tokenizer.decode
        alone: str = decode([token], skip_special_tokens=False)
        return str(decode([token, token], skip_special_tokens=False))[len(alone) :]


def _json(path: Path) -> dict[str, Any]:
    """What the file says, or nothing if there is none."""
    sent: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return sent


def _chosen(templates: str | list[dict[str, str]] | None) -> str | None:
    """A model may have several, by name; the one for plain chats is called default."""
    if not isinstance(templates, list):
        return templates
    return next((each["template"] for each in templates if each.get("name") == "default"), None)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Those that templates use by name, such as `bos_token`: given as text, or as an object with its settings."""
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in found.items() if name.endswith("_token") and isinstance(value, str)}
