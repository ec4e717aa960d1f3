"""Bounded types for the fields of JSON requests, and their base, which refuses unknown fields."""

from typing import Annotated

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField

Id = Annotated[str, Meta(min_length=1, max_length=limits.id_chars_max)]
Text = Annotated[str, Meta(max_length=limits.text_chars_max)]
Number = Annotated[int, Meta(ge=0, le=limits.counter_max)]  # a client's counter
Seq = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # an int32 in its protobuf
Seed = Annotated[int, Meta(ge=limits.seed_min, le=limits.seed_max)]
Ttl = Annotated[int, Meta(ge=limits.ttl_s_min, le=limits.ttl_s_max)]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Path = Annotated[str, Meta(max_length=limits.text_chars_max)]
Labels = dict[str, str]


class RequestBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all JSON requests."""


AccessToken = Annotated[str, Meta(max_length=limits.token_chars_max)]


def expect_no_access_token(token: str | None) -> None:
    """Raises InvalidField for a token, without repeating it."""
    if token is not None:
        raise InvalidField(
            "weights_access_token", "(not shown)", "none: this server has no access tokens for weights",
            "The checkpoint's owner can publish it (`tinker checkpoint publish`), and then anyone's key loads it",
        )  # fmt: skip


def encode(request: RequestBody) -> bytes:
    return msgspec.json.encode(request)
