"""How one request's tools are told to the model, and its calls forced or found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knapper.catalogue import call_formats
from knapper.catalogue.call_formats import CallFormat, Hermes
from knapper.catalogue.call_reader import CallReader
from knapper.catalogue.tokenizer import Language
from knapper.catalogue.tools import AgentMessage, Tool, ToolUse
from knapper.catalogue.tools_in_words import in_words
from knapper.wire import grammars


@dataclass(frozen=True)
class Calling:
    """`form`: how the model writes calls; None: it is offered no tools."""

    language: Language
    use: ToolUse
    form: CallFormat | None

    @staticmethod
    def of(language: Language, use: ToolUse) -> "Calling":
        """Raises InvalidField for a model whose calls cannot be read."""
        if not use.offered or language.template is None:
            return Calling(language, use, None)
        template = language.template
        return Calling(language, use, call_formats.of_template(template.source) if template.takes_tools else Hermes())

    def prompt(
        self, messages: Sequence[AgentMessage], now: float, more: Mapping[str, object], context: int
    ) -> list[int]:
        """The prompt's tokens. Raises UserError."""
        takes_tools = self.language.template is not None and self.language.template.takes_tools
        tools: Sequence[Tool] = self.use.offered if takes_tools else ()
        told = messages if takes_tools else in_words(messages, self.use.offered)
        return self.language.chat(told, now, more, tools=tools, context=context)

    def grammar(self, answer: Mapping[str, Any] | None) -> str:
        """What the text must follow; empty: nothing. `answer`: the part that an answer in words must follow."""
        tokenizer = self.language.tokenizer
        if self.form is not None and self.use.forced:
            return self.form.grammar(self.use.forced, self.several and self.use.name is None, tokenizer)
        if answer is None:
            return ""
        if self.form is None:
            return grammars.joined(answer, {}, "response_format")
        return self.form.grammar(self.use.offered, self.several, tokenizer, answer)

    @property
    def several(self) -> bool:
        return self.use.several

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer: the first call's end, where no second is wanted and no grammar says so."""
        if self.form is None or self.several or self.use.forced or self.form.closing is None:
            return ()
        return (self.form.closing,)

    @property
    def special_tokens(self) -> Mapping[int, str]:
        return {} if self.form is None else self.form.special_tokens(self.language.tokenizer)

    def reader(self) -> CallReader | None:
        if self.form is None:
            return None
        return CallReader(self.form, {tool.name: tool for tool in self.use.offered}, self.several)

    def call_id(self, unique: str, prefix: str = "call_") -> str:
        """`unique`: letters and digits. Some templates insist on a length when the call comes back."""
        if self.form is not None and self.form.id_chars is not None:
            return unique[-self.form.id_chars :]
        return f"{prefix}{unique}"
