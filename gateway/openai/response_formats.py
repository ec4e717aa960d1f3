"""The field `response_format`: how a text is constrained."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField
from knapper.wire import grammars

_ANY_OBJECT = {"type": "object"}


class NamedSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`strict` changes nothing: a text follows its schema in any case. `name` and `description` are labels."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.name_chars_max)]
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self, field: str = "response_format") -> str:
        """Empty for a text. Raises InvalidField."""
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise InvalidField(f"{field}.json_schema", "given", 'none beside any other type than "json_schema"')
            return "" if self.type == "text" else _grammar(_ANY_OBJECT, field)
        if self.json_schema is None or self.json_schema.schema is None:
            raise InvalidField(f"{field}.json_schema.schema", None, 'a JSON schema, or the type "json_object"')
        return _grammar(self.json_schema.schema, f"{field}.json_schema.schema")


def _grammar(schema: dict[str, Any] | bool, field: str) -> str:
    return grammars.joined(grammars.json_part(schema, field), {}, field)
