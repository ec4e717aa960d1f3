"""Models' own chat templates, in Jinja, rendered in a sandbox without side effects.

Besides Jinja itself, a template may use what transformers provides: `messages`, `add_generation_prompt`, the
special tokens, `raise_exception`, `strftime_now`, loop controls, and the block `generation`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from knapper.catalogue.tools import AgentMessage, Tool
from knapper.errors import InvalidField, UserError
from knapper.wire.untrusted import parsing

_OURS = ("add_generation_prompt", "documents", "messages", "raise_exception", "strftime_now", "tools")


class Template:
    """One chat template. Raises InvalidField if it is not one."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        self._special_tokens = dict(special_tokens)
        with parsing(
            lambda error: InvalidField("chat_template", source, "a Jinja template", f"{error}. Repair the model's")
        ):
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self.source = source

    def render(
        self,
        messages: Sequence[AgentMessage],
        now: float,
        more: Mapping[str, object],
        *,
        tools: Sequence[Tool] = (),
        answering: bool = True,
    ) -> str:
        """The prompt for the assistant's next words; without `answering` the messages alone.

        `now`: seconds since the epoch. `more`: further variables. `tools` are for a template that `takes_tools`.

        Raises UserError.
        """
        for name in more:
            if name in _OURS or name in self._special_tokens:
                raise InvalidField("chat_template_kwargs", name, "names that the server does not fill itself")
        variables = self._special_tokens | dict(more)
        with parsing(lambda error: UserError(f"the model's chat template cannot render these messages: {error}")):
            return self._template.render(
                **variables,
                messages=[dict(message) for message in messages],
                tools=[tool.as_template() for tool in tools] or None,
                documents=None,
                add_generation_prompt=answering,
                strftime_now=lambda form: time.strftime(form, time.localtime(now)),
            )


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: marks what an assistant said, for trainers; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """Without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
