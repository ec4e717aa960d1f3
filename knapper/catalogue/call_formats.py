"""How families of models write calls of tools: read off the chat template, parsed, and forced by a grammar.

Hermes (Qwen 2.5 and 3)   <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>
Qwen 3 Coder              <tool_call>\\n<function=f>\\n<parameter=a>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>
Mistral                   [TOOL_CALLS][{"name": "f", "arguments": {...}}]
Mistral, newer            [TOOL_CALLS]f[ARGS]{...}
Llama 3                   {"name": "f", "parameters": {...}}, the whole text
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from tokenizers import Tokenizer

from knapper.catalogue.tools import Tool, ToolCall
from knapper.errors import InvalidField
from knapper.wire import grammars, json_values

_CALLS_MAX: Final = 16  # that a grammar allows in one text: without an end, a small model finds none
_CLOSED: Final = "\n</parameter>"
_ABOVE: Final = ("$defs", "definitions")  # what references of a property lead to


class CallFormat(ABC):
    """`opening`: the text with which a call begins; `closing`: with which it ends, None: with the text.

    `id_chars`: how long the id of a call must be, where the template insists; None: as any.
    """

    opening: ClassVar[str]
    closing: ClassVar[str | None] = None
    id_chars: ClassVar[int | None] = None
    at_start_only: ClassVar[bool] = False  # `opening` inside of a text is no call
    markers: ClassVar[tuple[str, ...]] = ()  # which may be special tokens, and then have no text of their own

    @abstractmethod
    def parse(self, block: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
        """The calls between opening and closing; None if these are none of the tools."""

    @abstractmethod
    def rules(self, tools: Sequence[Tool], several: bool, mark: "Marks") -> tuple[str, dict[str, Mapping[str, Any]]]:
        """Rules in Lark's notation, of which `calls` is calls of these tools, one or several; and the parts they name.

        Raises InvalidField.
        """

    def grammar(
        self, tools: Sequence[Tool], several: bool, tokenizer: Tokenizer, answer: Mapping[str, Any] | None = None
    ) -> str:
        """A text that calls one of these tools, or several; or that follows the part `answer`. Raises InvalidField."""
        if answer is not None and self.at_start_only:
            allowed = "none beside tools with this model, whose calls are JSON too"
            raise InvalidField("response_format", "given", allowed, "Leave out one of the two")
        lark, parts = self.rules(tools, several, Marks(tokenizer))
        start = "start: calls" if answer is None else "start: calls | @answer"
        return grammars.joined(
            {"lark_grammar": f"{start}\n{lark}"}, parts if answer is None else {**parts, "answer": answer}, "tools"
        )

    def special_tokens(self, tokenizer: Tokenizer) -> dict[int, str]:
        """Tokens of the format that decoding leaves out, with their texts."""
        added = tokenizer.get_added_tokens_decoder().items()
        return {token: each.content for token, each in added if each.special and each.content in self.markers}


class Marks:
    """Markers in Lark's notation: llguidance knows an added token in angle brackets, or a special one, by its id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._added = {
            each.content: token
            for token, each in tokenizer.get_added_tokens_decoder().items()
            if each.special or (each.content.startswith("<") and each.content.endswith(">"))
        }

    def __call__(self, text: str) -> str:
        return f"<[{self._added[text]}]>" if text in self._added else json.dumps(text)


class Hermes(CallFormat):
    opening = "<tool_call>"
    closing = "</tool_call>"
    markers = (opening, closing)

    def parse(self, block: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
        call = _call(_json(block), "arguments", tools)
        return None if call is None else [call]

    def rules(self, tools: Sequence[Tool], several: bool, mark: Marks) -> tuple[str, dict[str, Mapping[str, Any]]]:
        bodies = [
            f"{mark(self.opening)} {json.dumps(_head(tool, 'arguments', before=chr(10)))} @t{i} "
            f'"}}\\n" {mark(str(self.closing))}'
            for i, tool in enumerate(tools)
        ]
        return _lark(bodies, several, '"\\n"'), _parts(tools)


class QwenCoder(CallFormat):
    opening = "<tool_call>"
    closing = "</tool_call>"
    markers = (opening, closing)
    _function: ClassVar = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*)?$", re.DOTALL)
    _parameter: ClassVar = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

    def parse(self, block: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
        match = self._function.match(block)
        if match is None or match[1] not in tools:
            return None
        properties = tools[match[1]].parameters.get("properties") or {}
        arguments = {name: _typed(text, properties.get(name)) for name, text in self._parameter.findall(match[2])}
        return [ToolCall(match[1], json_values.to_text(arguments))]

    def rules(self, tools: Sequence[Tool], several: bool, mark: Marks) -> tuple[str, dict[str, Mapping[str, Any]]]:
        bodies, values, parts = [], list[str](), dict[str, Mapping[str, Any]]()
        for i, tool in enumerate(tools):
            written = []
            for j, (name, schema) in enumerate((tool.parameters.get("properties") or {}).items()):
                value = f"t{i}p{j}"
                if (rule := _in_xml(schema)) is not None:
                    values.append(f"{value}{rule}")
                else:
                    values.append(f'{value}: @{value}json "\\n</parameter>"')
                    above = {key: tool.parameters[key] for key in _ABOVE if key in tool.parameters}
                    whole = {**above, **schema} if isinstance(schema, Mapping) else schema
                    parts[f"{value}json"] = grammars.json_part(whole, f"tools[{i}].parameters.properties.{name}")
                body = f'{json.dumps(f"<parameter={_plain(name, i)}>" + chr(10))} {value} "\\n"'
                written.append(body if name in (tool.parameters.get("required") or ()) else f"({body})?")
            head = json.dumps(f"\n<function={tool.name}>\n")
            bodies.append(" ".join([mark(self.opening), head, *written, f'"</function>\\n" {mark(str(self.closing))}']))
        return "\n".join([_lark(bodies, several, '"\\n"'), *values]), parts


class Mistral(CallFormat):
    opening = "[TOOL_CALLS]"
    markers = (opening,)
    id_chars = 9

    def parse(self, block: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
        calls = _json(block)
        found = [_call(each, "arguments", tools) for each in calls] if isinstance(calls, list) else []
        return [call for call in found if call is not None] if found and None not in found else None

    def rules(self, tools: Sequence[Tool], several: bool, mark: Marks) -> tuple[str, dict[str, Mapping[str, Any]]]:
        bodies = [f'{json.dumps(_head(tool, "arguments"))} @t{i} "}}"' for i, tool in enumerate(tools)]
        return _lark(bodies, several, '", "', f'{mark(self.opening)} "["', '"]"'), _parts(tools)


class MistralArguments(CallFormat):
    opening = "[TOOL_CALLS]"
    markers = (opening, "[ARGS]", "[CALL_ID]")
    id_chars = 9
    _one: ClassVar = re.compile(r"\s*([^\s\[{]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*")

    def parse(self, block: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
        calls = []
        for written in block.split(self.opening):
            match = self._one.match(written)
            arguments = _json(written[match.end() :]) if match else None
            if match is None or match[1] not in tools or not isinstance(arguments, dict):
                return None
            calls.append(ToolCall(match[1], json_values.to_text(arguments)))
        return calls

    def rules(self, tools: Sequence[Tool], several: bool, mark: Marks) -> tuple[str, dict[str, Mapping[str, Any]]]:
        bodies = [
            f"{mark(self.opening)} {json.dumps(tool.name)} {mark('[ARGS]')} @t{i}" for i, tool in enumerate(tools)
        ]
        return _lark(bodies, several, ""), _parts(tools)


class Llama(CallFormat):
    opening = "{"
    at_start_only = True

    def parse(self, block: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
        call = _call(_json(self.opening + block), "parameters", tools)
        return None if call is None else [call]

    def rules(self, tools: Sequence[Tool], several: bool, mark: Marks) -> tuple[str, dict[str, Mapping[str, Any]]]:
        del several, mark  # one call, and no marker
        bodies = [f'{json.dumps(_head(tool, "parameters"))} @t{i} "}}"' for i, tool in enumerate(tools)]
        return _lark(bodies, False, ""), _parts(tools)


def of_template(source: str) -> CallFormat:
    """The format of a chat template that takes tools. Raises InvalidField for one that no class here reads."""
    for found, kind in _signs(source):
        if found:
            return kind()
    raise InvalidField(
        "tools", "given", "none with this model: its chat template writes calls in a form that is not read here",
        "Describe the tools in a message, and ask for JSON by response_format",
    )  # fmt: skip


def _signs(source: str) -> Iterator[tuple[bool, type[CallFormat]]]:
    yield "<function=" in source and "<parameter=" in source, QwenCoder
    yield "<tool_call>" in source and "<arg_key>" not in source, Hermes
    yield "[TOOL_CALLS]" in source and "[ARGS]" in source, MistralArguments
    yield "[TOOL_CALLS]" in source, Mistral
    yield '"parameters": ' in source and "python_tag" in source, Llama


def _lark(bodies: Sequence[str], several: bool, between: str, begin: str = "", end: str = "") -> str:
    calls = f"call ({between} call){{0,{_CALLS_MAX - 1}}}" if several else "call"
    return f"calls: {begin} {calls} {end}\ncall: {' | '.join(f'({body})' for body in bodies)}"


def _head(tool: Tool, key: str, before: str = "") -> str:
    return f'{before}{{"name": {json.dumps(tool.name)}, "{key}": '


def _parts(tools: Sequence[Tool]) -> dict[str, Mapping[str, Any]]:
    return {f"t{i}": tool.part(f"tools[{i}].parameters") for i, tool in enumerate(tools)}


def _json(text: str) -> Any:
    try:
        return json_values.of_text(text)
    except json_values.NotJson:
        return None


def _call(written: Any, key: str, tools: Mapping[str, Tool]) -> ToolCall | None:
    """One call of an object with name and arguments. A model may write the arguments as a text of JSON."""
    name = written.get("name") if isinstance(written, dict) else None
    if not isinstance(name, str) or name not in tools:
        return None
    arguments = written.get(key, {})
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    return ToolCall(name, json_values.to_text(arguments)) if isinstance(arguments, dict) else None


def _in_xml(schema: Any) -> str | None:
    """The rule for a text as it stands between the marks, without quotes; None for what is written as JSON."""
    if not isinstance(schema, Mapping) or {"const", "pattern", "format"} & schema.keys():
        return None
    if (choices := schema.get("enum")) is not None:
        if not choices or not all(isinstance(each, str) for each in choices):
            return None
        return f": ({' | '.join(map(json.dumps, choices))}) {json.dumps(_CLOSED)}"
    if schema.get("type") != "string":
        return None
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if not all(isinstance(bound, int) or bound == "" for bound in (least, most)):
        return None  # the JSON schema's compiler says what is wrong
    return f"[suffix={json.dumps(_CLOSED)}]: /(.|\\n){{{least},{most}}}/"


def _typed(text: str, schema: Any) -> Any:
    """A parameter's value: its text where the schema says text, or where it is no JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text if _in_xml(schema) or not text.startswith('"') else _json(text)
    try:
        return json_values.of_text(text)
    except json_values.NotJson:
        return text


def _plain(name: str, tool: int) -> str:
    if ">" in name or "\n" in name:
        raise InvalidField(
            f"tools[{tool}].parameters.properties", name, "names without > and line ends, for this model"
        )
    return name
