"""What is wrong with an answer, whatever was asked: the contract that every route keeps."""

import json
from dataclasses import dataclass
from typing import Any

from tests.fuzz.asks import Way

_TELLS_MAX = 2100  # characters of an error: what it quotes is shortened in it
# What Anthropic's protocol calls an error that is the user's, by its status; 400 and all others: invalid_request_error.
_MESSAGES_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")

    def json(self) -> Any:
        """The body's value, or None if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def fault(way: Way, answer: Answer) -> str | None:
    """Why the answer is not one that a server may give, in a few words; None for one that it may."""
    if answer.status >= 500 or answer.status == 429:
        return _later(answer)
    if answer.status >= 400:
        return _refusal(way, answer)
    if answer.status == 200 and way[1] == "/api/v1/retrieve_future":
        content = answer.json()
        if isinstance(content, dict) and content.get("category") == "server":
            return f"a result that blames the server: {content.get('error')}"
    if "event-stream" in answer.header("content-type") and b"server_error" in answer.body:
        return f"a stream that blames the server: {answer.body[-300:]!r}"
    return None


def _later(answer: Answer) -> str | None:
    if answer.status in (429, 503) and answer.header("retry-after").isdecimal():
        return None
    return f"status {answer.status}: {answer.body[:500]!r}"


def _refusal(way: Way, answer: Answer) -> str | None:
    content = answer.json()
    if not isinstance(content, dict):
        return f"a {answer.status} without the error's form: {answer.body[:300]!r}"
    if answer.status == 408 and way[1] == "/api/v1/retrieve_future":
        return None if content.get("type") == "try_again" else f"a 408 of another form: {content}"
    if way[1].startswith(("/v1/", "/oai/", "/playground/")) and "error" in content:
        content = content["error"]
        kinds = _MESSAGES_ERRORS if way[1].startswith("/v1/messages") else {}
        whose = content.get("type") == kinds.get(answer.status, "invalid_request_error")
        said, code = content.get("message"), content.get("code")
    else:
        said, code, whose = content.get("detail"), content.get("code"), content.get("category") == "user"
    if not isinstance(said, str) or not isinstance(code, str) or not said or not code:
        return f"a {answer.status} without what is wrong or its code: {content}"
    if not whose:
        return f"a {answer.status} that is not the user's: {content}"
    if len(said) > _TELLS_MAX:
        return f"an error of {len(said)} characters: {said[:200]}"
    if code == "invalid_field" and ("; allowed: " not in said or " is " not in said):
        return f"an invalid_field that does not say the field, its value and what is allowed: {said}"
    return None
