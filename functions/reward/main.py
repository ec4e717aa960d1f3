"""reward: scores completions and a job's rollouts. Stateless; user-supplied code runs in the sandbox."""

import os
import time
from functools import cache, partial

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from knapper.errors import KnapperError
from knapper.events import cloudevents
from knapper.events.function_key import FunctionKey
from knapper.jobs.job_files import Folders
from knapper.jobs.plays import play
from knapper.jobs.scores import Scoring
from knapper.jobs.services import JobServices, open_job_services
from knapper.jobs.worker import Worker
from knapper.observability import logs, traces
from knapper.rewards import requests
from knapper.rewards.scorer import score
from knapper.sandbox.pool import Sandbox
from knapper.serving import http, metrics_page
from knapper.settings import Settings
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store

logs.begin("reward", Settings.load(os.environ))
sandbox = Sandbox()  # its processes start with the first reward that needs them, and end with this process


@cache
def job_services() -> JobServices:
    settings = Settings.load(os.environ)
    return open_job_services(settings, CountedStore(open_store(settings)), time.time)


@cache
def key() -> FunctionKey:
    return FunctionKey(job_services().store)


@cache
def scoring() -> Scoring:
    """The worker for jobs."""
    worker = Worker("reward", job_services(), Folders(job_services().store), ["rl"])
    return Scoring(worker, lambda *args: score(*args, sandbox=sandbox), partial(play, sandbox=sandbox))


@functions_framework.aio.http
async def reward(request: Request) -> Response:
    if metrics_page.is_scrape(request):
        return metrics_page.respond()
    try:
        body = await http.authenticated_body(request, key())
        if cloudevents.is_event(request.headers):
            event = cloudevents.decode(request.headers, body)
            with traces.span("reward", event.traceparent, subject=event.subject):
                await scoring().answer(event)
            return http.durable()
        scores = await http.while_connected(request, requests.answer(body, sandbox))
    except KnapperError as error:
        return http.error(error)
    return Response(scores, media_type="application/json")
