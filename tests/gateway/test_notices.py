"""Each client gets its notice once, in the form that its SDK prints, and other clients get none."""

from typing import Any

import pytest
import tinker

from gateway import notices
from knapper.errors import InvalidField
from knapper.settings import Settings
from tests.gateway.running import Running, gateway

NOTICE = "Down at 18:00 for an hour."


def told(running: Running, sdk_version: str) -> tuple[str, str]:
    """(what the header of client/config says, what create_session's reply says)"""
    body = {"sdk_version": sdk_version}
    config = running.http.post("client/config", json=body)
    session: dict[str, Any] = running.post("create_session", body)
    assert ("x-deprecation-level" in config.headers) == ("x-deprecation-note" in config.headers)
    return config.headers.get("x-deprecation-note", ""), session["warning_message"] or ""


@pytest.mark.parametrize(("sdk_version", "word"), [
    ("0.17.9", "is not served here"), ("0.18.0", "as JSON"), ("0.24.1", "as JSON"), ("0.25.0", ""), ("0.35.2", ""),
    ("0.36.0", ""), ("0.38.0", ""), ("0.38.7", ""), ("0.39.0", "is newer than"), ("1.0", "is newer than"), ("x", ""),
    ("", ""),
])  # fmt: skip
def test_what_an_sdk_is_told_of_itself(sdk_version: str, word: str) -> None:
    with gateway() as running:
        notice = told(running, sdk_version)
    assert (word in "".join(notice)) if word else notice == ("", "")
    assert "" in notice, "twice the same"
    assert not word or "pip install tinker==0.38.0" in "".join(notice)


@pytest.mark.parametrize(("sdk_version", "in_header"), [
    ("0.18.0", False), ("0.35.9", False), ("0.36.0", True), ("0.38.0", True), ("0.40.0", True), ("?", False),
])  # fmt: skip
def test_the_operator_s_notice_comes_where_the_sdk_looks(sdk_version: str, in_header: bool) -> None:
    with gateway(notice=NOTICE) as running:
        header, message = told(running, sdk_version)
    assert (NOTICE in header, NOTICE in message) == (in_header, not in_header)


def test_the_versions_are_those_of_the_tests() -> None:
    assert tuple(map(int, tinker.__version__.split(".")[:2])) == notices.NEWEST


def test_a_notice_is_short_and_plain() -> None:
    assert Settings.load({"KNAPPER_NOTICE": "x" * 500}).notice == "x" * 500
    for text in ("x" * 501, "a\nb", "é"):
        with pytest.raises(InvalidField, match="at most 500 printable ASCII characters"):
            Settings.load({"KNAPPER_NOTICE": text})
