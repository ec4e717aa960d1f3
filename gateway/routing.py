"""Routes with a limit on the request body: no route is without one."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from gateway.body_budget import Hold

_LIMIT: Final = "knapper.body_bytes_max"
_HOLD: Final = "knapper.hold"


class Door(Route):
    """`body_bytes_max`: the limit on the decompressed body; 0 where none is read.

    The memory that a request takes for its body is released when the request is answered.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], *, methods: Sequence[str], body_bytes_max: int) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.body_bytes_max = body_bytes_max

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, {
            **child_scope,
            _LIMIT: self.body_bytes_max,
            _HOLD: Hold(),
        } if match is not Match.NONE else child_scope

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().handle(scope, receive, send)
        finally:
            hold_of(scope).release()


def body_bytes_max(request: Request) -> int:
    """The body limit of the request's route, in bytes."""
    allowed: int = request.scope[_LIMIT]
    return allowed


def hold_of(scope: Scope) -> Hold:
    hold: Hold = scope[_HOLD]
    return hold
