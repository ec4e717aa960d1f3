"""Routes, each with the most that a request to it may carry: there is none without a limit."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from gateway.body_budget import Hold

_LIMIT: Final = "knapper.body_bytes_max"
_HOLD: Final = "knapper.hold"


class Door(Route):
    """`body_bytes_max`: of a request's body, decompressed; 0 where none is read.

    What a request holds of the memory for bodies it gives back when it is answered.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], *, methods: Sequence[str], body_bytes_max: int) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.body_bytes_max = body_bytes_max

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, _LIMIT: self.body_bytes_max, _HOLD: Hold()} if match is not Match.NONE else found

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().handle(scope, receive, send)
        finally:
            hold_of(scope).release()


def body_bytes_max(request: Request) -> int:
    """What the request's route allows."""
    allowed: int = request.scope[_LIMIT]
    return allowed


def hold_of(scope: Scope) -> Hold:
    hold: Hold = scope[_HOLD]
    return hold
