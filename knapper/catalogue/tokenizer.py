"""What a model's directory says about text: its tokenizer, its special tokens, its chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from knapper.catalogue.chat_templates import Template
from knapper.catalogue.tools import AgentMessage, Tool
from knapper.errors import ContextLengthExceeded, InvalidField, UserError

_PIECE_CHARS: Final = 64 * 1024  # tokenized at once; a token takes some 400 bytes meanwhile


@dataclass(frozen=True)
class Language:
    """Text to tokens and back. A megabyte takes a second: encode in a thread, where it holds nobody up."""

    tokenizer: Tokenizer
    template: Template | None
    end: int | None = None  # the token that ends a text

    @staticmethod
    def read(directory: Path) -> "Language":
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja, or .json as older checkpoints of images
        have it. Raises InvalidField.
        """
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            config = _json(directory / "tokenizer_config.json")
            more = _json(directory / "special_tokens_map.json")
            older = _json(directory / "chat_template.json")
        except Exception as error:  # tokenizers raises nothing more specific
            allowed = "one whose tokenizer.json and tokenizer_config.json can be read here"
            raise InvalidField("model: directory", str(directory), allowed, str(error)) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        alone = directory / "chat_template.jinja"
        source = (
            alone.read_text(encoding="utf-8") if alone.is_file() else _chosen((older | config).get("chat_template"))
        )
        special = _special_tokens(more | config)
        template = None if source is None else Template(source, special)
        end = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
        return Language(tokenizer, template, end)

    def encode(self, text: str, *, context: int | None = None) -> list[int]:
        """With the special tokens that the tokenizer puts around any text."""
        return self._tokens(text, context, "prompt", special=True)

    def chat(
        self,
        messages: Sequence[AgentMessage],
        now: float,
        more: Mapping[str, object],
        *,
        tools: Sequence[Tool] = (),
        context: int | None = None,
    ) -> list[int]:
        """The prompt for the assistant's next words, from the model's template. Raises UserError."""
        return self._tokens(self.render(messages, now, more, tools=tools), context, "messages", special=False)

    def _tokens(self, text: str, context: int | None, field: str, *, special: bool) -> list[int]:
        """Raises ContextLengthExceeded for a text of far more tokens than `context`; others the sampler judges."""
        if context is not None and len(text) > _PIECE_CHARS:
            self._expect_short(text, context, field)
        return self._encode(text, special=special)

    def _expect_short(self, text: str, context: int, field: str) -> None:
        """Counts the tokens of pieces, and stops at twice the context: of a text of any length no more is looked at.

        A cut makes more tokens than there are, but no more than a token has characters, on either side.
        """
        longest, counted = self._token_chars_max, 0
        for pieces, at in enumerate(range(0, len(text), _PIECE_CHARS), 1):
            counted += len(self._encode(text[at : at + _PIECE_CHARS], special=False))
            if counted > 2 * (context + pieces * longest):
                because = f" (counting stopped there; it has {len(text)} characters)"
                error = ContextLengthExceeded(counted, context - 1, context, because)
                error.field = field
                raise error

    def _encode(self, text: str, *, special: bool) -> list[int]:
        """As a batch: only that lets go of the interpreter's lock."""
        (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoded.ids
        return ids

    @cached_property
    def _token_chars_max(self) -> int:
        return max(map(len, self.tokenizer.get_vocab(with_added_tokens=True)))

    def render(
        self,
        messages: Sequence[AgentMessage],
        now: float,
        more: Mapping[str, object],
        *,
        tools: Sequence[Tool] = (),
        answering: bool = True,
    ) -> str:
        """The messages as the model's template writes them; `answering`: up to the assistant's next words.

        Raises UserError.
        """
        if self.template is None:
            raise UserError(
                "the model has no chat template, as base models do not; allowed: a prompt that is plain text (to "
                "v1/completions, or in a job's rows), or put a chat_template.jinja into the model's directory and "
                "start knapper again"
            )
        return self.template.render(messages, now, more, tools=tools, answering=answering)

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
