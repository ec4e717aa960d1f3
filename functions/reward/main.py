"""reward: what completions, and a job's rollouts, are worth. Keeps nothing; code of others runs in the sandbox."""

import os
import time
from functools import cache

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from knapper import events, metrics, telemetry, tracing
from knapper.errors import KnapperError
from knapper.function_key import FunctionKey
from knapper.jobs.folders import Folders
from knapper.jobs.place import Place, open_place
from knapper.jobs.scoring import Scoring
from knapper.jobs.working import Worker
from knapper.rewards import requests
from knapper.rewards.scoring import score
from knapper.sandbox.pool import Sandbox
from knapper.serving import answers, observing
from knapper.settings import Settings
from knapper.store.opening import open_store

telemetry.begin("reward", Settings.load(os.environ))
sandbox = Sandbox()  # its processes start with the first reward that needs them, and end with this one


@cache
def place() -> Place:
    """Where the state lies comes from the environment."""
    settings = Settings.load(os.environ)
    return open_place(settings, metrics.CountedStore(open_store(settings)), time.time)


@cache
def key() -> FunctionKey:
    return FunctionKey(place().store)


@cache
def scoring() -> Scoring:
    """What is done for jobs."""
    return Scoring(Worker(place(), Folders(place().store), ["rl"]), lambda *given: score(*given, sandbox=sandbox))


@functions_framework.aio.http
async def reward(request: Request) -> Response:
    if observing.asked(request):
        return observing.answer()
    try:
        body = await answers.admitted(request, key())
        if events.sent(request.headers):
            event = events.decode(request.headers, body)
            with tracing.span("reward", event.traceparent, subject=event.subject):
                await scoring().answer(event)
            return answers.durable()
        scores = await answers.while_connected(request, requests.answer(body, sandbox))
    except KnapperError as error:
        return answers.error(error)
    return Response(scores, media_type="application/json")
