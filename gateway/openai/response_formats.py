"""The field `response_format`: how a text is constrained."""

from collections.abc import Mapping
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

    def part(self, field: str = "response_format") -> Mapping[str, Any] | None:
        """The part of a grammar that the text follows; None for any text. Raises InvalidField."""
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise InvalidField(f"{field}.json_schema", "given", 'none beside any other type than "json_schema"')
            return None if self.type == "text" else grammars.json_part(_ANY_OBJECT, field)
        if self.json_schema is None or self.json_schema.schema is None:
            raise InvalidField(f"{field}.json_schema.schema", None, 'a JSON schema, or the type "json_object"')
        return grammars.json_part(self.json_schema.schema, f"{field}.json_schema.schema")
