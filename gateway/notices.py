"""The notice that a client prints in its user's terminal when it starts: on its SDK's version, and the operator's.

From 0.36 on the SDK logs the headers of `errors.notice`; older ones log only a message in create_session's response.
Each client gets the notice once, in the form that it logs.
"""

import re

OLDEST, NEWEST = (0, 18), (0, 38)  # the SDKs that are served and tested
_JSON_UNTIL = (0, 25)  # older ones send forward and backward passes as JSON
_HEADERS_FROM = (0, 36)

_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")


def for_header(sdk_version: str, operator: str) -> str:
    """For the response to client/config; empty if there is no notice, or if this SDK would not log it."""
    return _notice(sdk_version, operator) if _logs_headers(sdk_version) else ""


def for_session(sdk_version: str, operator: str) -> str:
    """For the response to create_session, which older SDKs log."""
    return "" if _logs_headers(sdk_version) else _notice(sdk_version, operator)


def _logs_headers(sdk_version: str) -> bool:
    version = _parse(sdk_version)
    return version is not None and version >= _HEADERS_FROM


def _notice(sdk_version: str, operator: str) -> str:
    return " ".join(part for part in (_version_notice(sdk_version), operator) if part)


def _version_notice(sdk_version: str) -> str:
    version = _parse(sdk_version)
    if version is None:
        return ""
    newest = f"{NEWEST[0]}.{NEWEST[1]}"
    todo = f"pip install tinker=={newest}.0."
    if version < OLDEST:
        return f"tinker {sdk_version} is not served here: {todo}"
    if version < _JSON_UNTIL:
        return f"tinker {sdk_version} sends data as JSON, which is slow and will not be served for ever: {todo}"
    if version > NEWEST:
        return f"tinker {sdk_version} is newer than this server, which knows {newest}; if a call fails: {todo}"
    return ""


def _parse(sdk_version: str) -> tuple[int, int] | None:
    match = _VERSION.match(sdk_version)
    return (int(match[1]), int(match[2])) if match else None
