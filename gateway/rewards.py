"""Scores for a client's own loop: its rollouts go to the reward function, whose answer comes back as it is."""

from starlette.requests import Request
from starlette.responses import Response

from gateway import bodies
from gateway.services import parts
from gateway.tenants import tenant_of


async def score(request: Request) -> Response:
    gateway, _ = parts(request), tenant_of(request)
    return await gateway.rewards.score(await bodies.read(request))
