"""reward: what completions are worth. Keeps nothing; code that is not ours runs in the sandbox, a process a rollout."""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from knapper.errors import KnapperError
from knapper.rewards import requests
from knapper.sandbox.pool import Sandbox
from knapper.serving import answers

sandbox = Sandbox()  # its processes start with the first reward that needs them, and end with this one


@functions_framework.aio.http
async def reward(request: Request) -> Response:
    try:
        scores = await answers.while_connected(request, requests.answer(await answers.body(request), sandbox))
    except KnapperError as error:
        return answers.error(error)
    return Response(scores, media_type="application/json")
