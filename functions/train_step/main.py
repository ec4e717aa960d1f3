"""train_step: apply one run's waiting operations in order, and commit; for a job, the next steps of its run.

Safe to run twice, or to kill at any line.
"""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper import events, tracing
from knapper.errors import KnapperError
from knapper.function_key import FunctionKey
from knapper.serving import answers, gates, jobs, observing

engine = gates.engine()  # before the port binds: the weights are there when the first bell rings, or why they are not
key = FunctionKey(jobs.place().store)


@functions_framework.aio.http
async def train_step(request: Request) -> Response:
    if observing.asked(request):
        return observing.answer()
    try:
        event = events.decode(request.headers, await answers.admitted(request, key))
        with tracing.span("train_step", event.traceparent, subject=event.subject):
            if event.type != events.OPERATIONS:
                await jobs.train(event)
                return answers.durable()
            frames = engine.value().residents.answer(events.run_of(event), event.hint)
            first = await anext(frames)  # the claim: it succeeds before anything is answered
    except KnapperError as error:
        return answers.error(error)
    return StreamingResponse(answers.stream(first, frames), media_type=events.FRAMES)
