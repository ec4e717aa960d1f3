"""JSON of anybody: a part of it is explained as the whole is, and no key is there twice."""

import pytest

from knapper.catalogue.conversations import ChatMessage
from knapper.errors import InvalidField, UserError
from knapper.wire import json


def test_what_is_wrong_in_a_part_is_named_by_the_place_of_the_part() -> None:
    sent = [{"role": "user", "content": "a"}, {"role": "user", "content": 5}]
    with pytest.raises(InvalidField, match=r"^chosen\[1\]\.content is 5; allowed: "):
        json.shape(sent, list[ChatMessage], "chosen")
    with pytest.raises(InvalidField, match=r"^chosen\[0\]\.rol is 'x'; allowed: no field of this name, only role, "):
        json.shape([{"rol": "x"}], list[ChatMessage], "chosen")
    assert json.shape(sent[:1], list[ChatMessage], "chosen") == [ChatMessage(role="user", content="a")]


@pytest.mark.parametrize(
    "body", [b'{"a": 1, "a": 1}', b'[{"b": {"a": [], "x": 0, "a": 2}}]', b'{"a": 1, "\\u0061": 2}']
)
def test_a_key_that_is_there_twice_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidField, match=r"^a is 'there a second time'; allowed: each field once"):
        json.loads(body)


def test_equal_keys_of_different_objects_are_none_that_is_there_twice() -> None:
    assert json.loads(b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}') == {"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}


@pytest.mark.parametrize("body", [b"\xff\xfe{\x00}\x00", b"[" * 100_000, b"1" * 5000, b"{"])
def test_what_is_no_json_in_utf_8_is_a_fault_of_the_sender(body: bytes) -> None:
    with pytest.raises(UserError, match="is not JSON"):
        json.loads(body)
