"""What a job's `reward:` may say: one term, or a weighted list of them. Parsing runs no code of anybody."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField, UserError
from knapper.text.suggestions import did_you_mean
from knapper.wire import json
from knapper.wire.untrusted import parsing

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]  # of a file beside job.yaml
Label = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_]{0,62}$")]
Mark = Annotated[str, Meta(max_length=128)]
FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,127}$")]
Seconds = Annotated[float, Meta(ge=0.1, le=limits.reward_s_max)]


class Term(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of the sum. `label`: its key among the parts of a score; the reward's own name unless given."""

    weight: float = 1.0
    label: Label | None = None


class Textual(Term, frozen=True, kw_only=True):
    """A term that looks at a part of the completion; it scores 0 where that part is missing."""

    between: tuple[Mark, Mark] | None = None  # the last text between these marks; an empty second one: to the end
    take: Literal["all", "last_line", "code_block"] = "all"  # of that text; code_block: the last ``` block


class ExactMatch(Textual, frozen=True, kw_only=True):
    """1 if the text is the answer, both without the white space around them."""

    ignore_case: bool = False


class Numeric(Textual, frozen=True, kw_only=True):
    """1 if the last number of the text is the answer, within the larger of both tolerances."""

    absolute: Annotated[float, Meta(ge=0)] = 1e-9
    relative: Annotated[float, Meta(ge=0)] = 1e-6


class Regex(Textual, frozen=True, kw_only=True):
    """1 if the pattern (of Python's re) is found in the text; `whole`: if it matches all of it."""

    pattern: Annotated[str, Meta(min_length=1, max_length=limits.reward_pattern_chars_max)]
    whole: bool = False
    timeout_s: Seconds = 2.0


class Maths(Textual, frozen=True, kw_only=True):
    """1 if the text and the answer are equal as mathematics (math-verify reads LaTeX and plain expressions)."""

    timeout_s: Seconds = 5.0


class JsonSchema(Textual, frozen=True, kw_only=True):
    """1 if the text is JSON that the schema allows."""

    json_schema: Name  # a file beside job.yaml
    timeout_s: Seconds = 2.0


class Sql(Textual, frozen=True, kw_only=True):
    """1 if the text, as one SQL query, gives the rows that the answer (a query, or a list of rows) gives."""

    database: Name  # a file beside job.yaml: SQL that makes the tables and fills them
    ordered: bool = False
    timeout_s: Seconds = 5.0


class PythonTests(Textual, frozen=True, kw_only=True):
    """The text is a program; the answer (Python with asserts, or a list of such) tests its functions.

    1 if all pass; `partial`: the fraction of the list that passes. `functions`: what of the program the tests see; all,
    unless given, except what Python itself has under that name.
    """

    take: Literal["all", "last_line", "code_block"] = "code_block"
    partial: bool = False
    functions: Annotated[tuple[FunctionName, ...], Meta(min_length=1, max_length=64)] | None = None
    timeout_s: Seconds = 10.0


class Length(Term, frozen=True, kw_only=True):
    """1 from `min` to `max` characters or words; outside it falls to 0 over `slope` of them."""

    unit: Literal["characters", "words"] = "characters"
    min: Annotated[int, Meta(ge=0)] = 0
    max: Annotated[int, Meta(ge=0)]
    slope: Annotated[int, Meta(ge=0)] = 0


class Format(Term, frozen=True, kw_only=True):
    """1 if the completion is these tags in this order, each once, with white space at most around them."""

    tags: Annotated[tuple[Label, ...], Meta(min_length=1, max_length=16)]


class Code(Term, frozen=True, kw_only=True):
    """`reward(prompt, completion, answer) -> float` of a file beside job.yaml, in the sandbox."""

    code: Name
    timeout_s: Seconds = 10.0


NAMED: dict[str, type[Term]] = {
    "exact_match": ExactMatch,
    "regex": Regex,
    "numeric": Numeric,
    "maths": Maths,
    "json_schema": JsonSchema,
    "sql": Sql,
    "python_tests": PythonTests,
    "length": Length,
    "format": Format,
}


@dataclass(frozen=True)
class Reward:
    """A weighted sum. `terms`: label -> term; `files`: the texts of those that the terms name."""

    terms: Mapping[str, Term]
    files: Mapping[str, str]


def parse(spec: object, files: Mapping[str, bytes]) -> Reward:
    """The reward that `spec` describes, with the files that it names. Raises UserError, naming the field."""
    terms: dict[str, Term] = {}
    for where, name, term in _terms(spec):
        label = term.label or name
        if label in terms:
            raise InvalidField(
                f"{where}.label", label, "a label that no other term has", "Give each term a label of its own"
            )
        terms[label] = term
        _check(where, term)
    texts = {name: _text(name, files) for name in names(spec)}
    for term in terms.values():
        if isinstance(term, JsonSchema):
            _check_schema(term.json_schema, texts[term.json_schema])
    return Reward(terms, texts)


def names(spec: object) -> list[str]:
    """The files beside job.yaml that `spec` needs. Raises UserError if it is not a reward."""
    found = []
    for _, _, term in _terms(spec):
        for field in ("code", "json_schema", "database"):
            if (name := getattr(term, field, None)) is not None and name not in found:
                found.append(name)
    return found


def _terms(spec: object) -> list[tuple[str, str, Term]]:
    if not isinstance(spec, list):
        return [("reward", *_term("reward", spec))]
    if not 1 <= len(spec) <= limits.reward_terms_max:
        raise InvalidField("reward", f"a list of {len(spec)}", f"1 to {limits.reward_terms_max} terms")
    return [(f"reward[{n}]", *_term(f"reward[{n}]", each)) for n, each in enumerate(spec)]


def _term(where: str, spec: object) -> tuple[str, Term]:
    if not isinstance(spec, dict) or ("name" in spec) == ("code" in spec):
        raise InvalidField(
            where, spec, f"`name:` (one of {', '.join(NAMED)}) or `code:` (a Python file beside job.yaml), not both"
        )
    if "code" in spec:
        return "code", _convert(where, spec, Code)
    name = spec["name"]
    if not isinstance(name, str) or name not in NAMED:
        todo = did_you_mean(name, NAMED) if isinstance(name, str) else ""
        todo = f"{todo} For a reward of your own write `code: reward.py`".strip()
        raise InvalidField(f"{where}.name", name, ", ".join(NAMED), todo)
    return name, _convert(where, {key: value for key, value in spec.items() if key != "name"}, NAMED[name])


def _convert(where: str, options: dict[Any, Any], kind: type[Term]) -> Term:
    with parsing(  # YAML says more than JSON: keys that are no texts, sets
        lambda error: UserError(f"{where} is not plain data: {error}; allowed: texts, numbers, true, false, lists")
    ):
        content = msgspec.json.encode(options)
    try:
        return json.decode(content, kind)
    except InvalidField as error:
        error.field = f"{where}.{error.field}"
        error.args = (f"{where}.{error}",)
        raise


def _check(where: str, term: Term) -> None:
    if isinstance(term, Regex):
        pattern = term.pattern
        with parsing(
            lambda error: InvalidField(f"{where}.pattern", pattern, "a regular expression of Python", str(error))
        ):
            re.compile(pattern)
    if isinstance(term, Length) and term.min > term.max:
        raise InvalidField(f"{where}.min", term.min, f"0 to max, which is {term.max}")
    if isinstance(term, Textual) and term.between is not None and not term.between[0]:
        raise InvalidField(f"{where}.between", term.between, "two marks, of which the first is not empty")


def _check_schema(name: str, text: str) -> None:
    try:
        content = json.loads(text.encode())
    except UserError as error:
        raise UserError(f"{name} is no JSON schema: {error}") from error
    if not isinstance(content, dict | bool):
        raise UserError(f"{name} is a {type(content).__name__}; allowed: a JSON schema, which is an object")


def _text(name: str, files: Mapping[str, bytes]) -> str:
    if name not in files:
        raise InvalidField("reward", name, f"a file that was sent: {', '.join(files) or 'there is none'}")
    return text_of(name, files[name])


def text_of(name: str, content: bytes) -> str:
    """The text of a file. Raises UserError for one that is too long, or not in UTF-8."""
    if len(content) > limits.reward_file_bytes_max:
        raise UserError(f"{name} has {len(content)} bytes; allowed: at most {limits.reward_file_bytes_max}")
    try:
        return content.decode().removeprefix("\ufeff")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a text in UTF-8: byte {error.start} is {content[error.start]:#x}") from error
