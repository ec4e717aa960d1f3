"""What a client prints in its user's terminal when it starts: that its SDK is old, or new, and what the operator says.

The SDK logs the headers of `errors.notice` from 0.36 on, and before that only a message in create_session's reply; each
client is told once, in the way that it hears.
"""

import re

OLDEST, NEWEST = (0, 18), (0, 38)  # SDKs that are served, and tested
_JSON_UNTIL = (0, 25)  # older ones send passes as JSON
_HEADERS_FROM = (0, 36)

_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")


def for_header(sdk_version: str, operator: str) -> str:
    """For the reply to client/config; empty if there is nothing to say, or if this SDK would not log it."""
    return _note(sdk_version, operator) if _logs_headers(sdk_version) else ""


def for_session(sdk_version: str, operator: str) -> str:
    """For the reply to create_session, which older SDKs log."""
    return "" if _logs_headers(sdk_version) else _note(sdk_version, operator)


def _logs_headers(sdk_version: str) -> bool:
    found = _parse(sdk_version)
    return found is not None and found >= _HEADERS_FROM


def _note(sdk_version: str, operator: str) -> str:
    return " ".join(part for part in (_of_version(sdk_version), operator) if part)


def _of_version(sdk_version: str) -> str:
    found = _parse(sdk_version)
    if found is None:
        return ""
    newest = f"{NEWEST[0]}.{NEWEST[1]}"
    todo = f"pip install tinker=={newest}.0."
    if found < OLDEST:
        return f"tinker {sdk_version} is not served here: {todo}"
    if found < _JSON_UNTIL:
        return f"tinker {sdk_version} sends data as JSON, which is slow and will not be served for ever: {todo}"
    if found > NEWEST:
        return f"tinker {sdk_version} is newer than this server, which knows {newest}; if a call fails: {todo}"
    return ""


def _parse(sdk_version: str) -> tuple[int, int] | None:
    match = _VERSION.match(sdk_version)
    return (int(match[1]), int(match[2])) if match else None
