"""train_step: apply one run's waiting operations in order, and commit; for a job, the next steps of its run.

Safe to run twice, or to kill at any line.
"""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper.errors import KnapperError
from knapper.events import cloudevents
from knapper.events.function_key import FunctionKey
from knapper.observability import traces
from knapper.serving import gates, http, jobs, metrics_page

engine = gates.engine()  # before the port binds: the weights are there when the first bell rings, or why they are not
key = FunctionKey(jobs.services().store)


@functions_framework.aio.http
async def train_step(request: Request) -> Response:
    if metrics_page.asked(request):
        return metrics_page.answer()
    try:
        event = cloudevents.decode(request.headers, await http.admitted(request, key))
        with traces.span("train_step", event.traceparent, subject=event.subject):
            if event.type != cloudevents.OPERATIONS:
                await jobs.train(event)
                return http.durable()
            frames = engine.value().residents.answer(cloudevents.run_of(event), event.hint)
            first = await anext(frames)  # the claim: it succeeds before anything is answered
    except KnapperError as error:
        return http.error(error)
    return StreamingResponse(http.stream(first, frames), media_type=cloudevents.FRAMES)
