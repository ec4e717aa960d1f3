"""train_step: apply and commit one run's waiting operations in order; for a job, take the next steps of its run.

Safe to run twice, and to kill at any line.
"""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper.errors import KnapperError
from knapper.events import cloudevents
from knapper.events.function_key import FunctionKey
from knapper.observability import traces
from knapper.serving import gates, http, jobs, metrics_page

engine = (
    gates.engine()
)  # before the port binds: the first doorbell finds the weights, or the reason why they are missing
key = FunctionKey(jobs.job_services().store)


@functions_framework.aio.http
async def train_step(request: Request) -> Response:
    if metrics_page.is_scrape(request):
        return metrics_page.respond()
    try:
        event = cloudevents.decode(request.headers, await http.authenticated_body(request, key))
        with traces.span("train_step", event.traceparent, subject=event.subject):
            if event.type != cloudevents.OPERATIONS:
                await jobs.train(event)
                return http.durable()
            frames = engine.value().runs.answer(cloudevents.run_of(event), event.hint)
            first = await anext(frames)  # the claim: a failure to claim decides the status
    except KnapperError as error:
        return http.error(error)
    return StreamingResponse(http.stream(first, frames), media_type=cloudevents.FRAMES)
