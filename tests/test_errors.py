"""Errors stay short, whatever they quote, and say all the same what is wrong and what is allowed."""

import pytest

from knapper import ids
from knapper.errors import InvalidField, KnapperError, NotFound, UserError
from knapper.wire import requests

LONG = "x" * 100_000


def test_the_name_of_an_unknown_field_is_quoted_in_part() -> None:
    with pytest.raises(InvalidField) as refused:
        requests.decode(f'{{"model_id": "a", "{LONG}": 1}}'.encode(), requests.GetInfo)
    said = str(refused.value)
    assert said.startswith("xxx")
    assert said.endswith("x is '(not shown)'; allowed: no field of this name, only model_id, type")
    assert len(said) < 2010


@pytest.mark.parametrize("check", [ids.session_id, ids.run_id, ids.sampler_id])
def test_a_name_that_does_not_exist_is_quoted_in_part(check: object) -> None:
    with pytest.raises(NotFound, match=r"^\w+( run)? 'xxx.* \.\.\. .*xxx' does not exist; create one with") as refused:
        check(LONG)  # type: ignore[operator]
    assert len(str(refused.value)) < 2010


def test_messages_of_usual_length_are_whole() -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(2000))
    assert str(UserError(text)) == text
    assert str(UserError(text + "!")) == f"{text[:1000]} ... {text[1001:]}!"
    assert str(KnapperError()) == ""
